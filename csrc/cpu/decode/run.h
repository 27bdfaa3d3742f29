// Cuts attention over a cache into splits, and distributes them over torch's threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/decode/append.h"
#include "cpu/decode/chunks.h"
#include "cpu/decode/kernels.h"
#include "cpu/runtime/threads.h"

namespace extrope::decode {

constexpr int64_t kBlockM = 64;        // query rows of a head of k that share one read of the cache
constexpr int64_t kSplitSize = 256;    // keys
constexpr int64_t kFewLogits = 4'096;  // below it a second thread costs more than it saves
// The time to read a key and its value, beside the work on one row, in rows; and the time to rotate
// a key on.
constexpr int64_t kReading = 6, kRotation = 8;
// Parts of a thread's share if splits differ, so that no thread waits long for another.
constexpr int64_t kParts = 8;

struct DecodeKernels {
  void (*decode)(const DecodeParams&, const Split*, int64_t);
  void (*merge)(const DecodeParams&, const QueryBlock*, int64_t);
};

// Cuts one sequence's queries, the tokens begin..end-1 of q's entry `batch`, into blocks.
inline void cut_sequence(const DecodeParams& p, const ChunkTokens& queries, int64_t& partial,
                         std::vector<QueryBlock>& all) {
  const auto [sequence, batch, begin, end] = queries;
  const int64_t tokens = std::max<int64_t>(1, kBlockM / (p.heads_q / p.cache.heads));
  const int64_t split_size = kSplitSize * ((end - begin + tokens - 1) / tokens);
  const int64_t first_slot = p.cache.first_slot(sequence);
  const int64_t length = std::max<int64_t>(p.cache.end(sequence) - first_slot, 0);
  for (int64_t first = begin; first < end; first += tokens) {
    const int64_t last = std::min(first + tokens, end), position = length - (end - first);
    const int64_t first_key = p.regions.start(0, position);
    const int64_t keys = std::max<int64_t>(position + last - first - first_key, 0);
    const int64_t splits = (keys + split_size - 1) / split_size;
    all.push_back({sequence, batch, first, last, position, first_slot, first_key, split_size,
                   splits, partial});
    partial += splits * (last - first) * p.heads_q;
  }
}

// Chunks, and the blocks of all other queries. Both depend only on the lengths, not on the threads;
// so does the result.
struct Work {
  std::vector<std::unique_ptr<QueryChunk>> chunks;
  std::vector<QueryBlock> blocks;
  int64_t partials = 0;  // rows of partial results
};

inline Work cut(const DecodeParams& p) {
  Work all;
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    const int32_t* cu = p.cu_seqlens_q;
    const ChunkTokens queries =
        cu ? ChunkTokens{b, 0, cu[b], cu[b + 1]} : ChunkTokens{b, b, 0, p.seqlen_q};
    if (is_chunk(p, queries.end - queries.begin)) {
      all.chunks.push_back(std::make_unique<QueryChunk>(p, queries));
    } else {
      cut_sequence(p, queries, all.partials, all.blocks);
    }
  }
  return all;
}

// Returns how many of the keys begin..end-1 rotate on for the query at `position`.
inline int64_t rotated_keys(const Regions& regions, int64_t position, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t r = 0; r < regions.count; ++r) {
    if (regions.at[r].k_map == regions.stored) continue;
    const int64_t first = std::max(begin, regions.start(r, position));
    count += std::max<int64_t>(std::min(end, regions.start(r + 1, position)) - first, 0);
  }
  return count;
}

struct Splits {
  std::vector<Split> all;
  int64_t logits, work;  // totals; work in units of a logit's time
};

inline Splits splits_of(const DecodeParams& p, const std::vector<QueryBlock>& blocks) {
  Splits splits{};
  for (const QueryBlock& block : blocks) {
    const int64_t tokens = block.last_token - block.first_token, rows = tokens * p.heads_q;
    const int64_t last = block.first_position + tokens - 1;
    for (int64_t n = 0; n < block.num_splits; ++n) {
      const int64_t begin = block.first_key + n * block.split_size;
      const int64_t end = std::min(begin + block.split_size, last + 1), keys = end - begin;
      const int64_t rotated = rotated_keys(p.regions, last, begin, end);
      const int64_t work = keys * rows + (keys * kReading + rotated * kRotation) * p.cache.heads;
      splits.all.push_back({&block, n, splits.work + work / 2});
      splits.logits += keys * rows;
      splits.work += work;
    }
  }
  return splits;
}

// Fills the results of packed tokens past the last sequence.
inline void fill_padding(const DecodeParams& p) {
  const int64_t first = p.cu_seqlens_q[p.cache.batch], count = p.seqlen_q - first;
  const int64_t row = p.heads_q * p.cache.head_dim_v * (p.cache.dtype == DType::f32 ? 4 : 2);
  std::memset(static_cast<char*>(p.out) + first * row, 0, count * row);
  for (int64_t head = 0; head < p.heads_q; ++head) {
    std::fill_n(p.lse + head * p.seqlen_q + first, count, -INFINITY);
  }
}

// Calls run(first, last) for the splits of each part, after all tiles of chunks: the longest work
// starts first.
inline void run_parts(const DecodeParams& p, const DecodeKernels& run, const Work& work,
                      const Splits& splits) {
  struct Tile {
    const QueryChunk* chunk;
    int64_t index;
  };
  std::vector<Tile> tiles;
  int64_t workspace = 0;
  for (const auto& chunk : work.chunks) {
    for (int64_t n = 0; n < chunk->tiles(); ++n) tiles.push_back({chunk.get(), n});
    workspace = std::max(workspace, chunk->workspace());
  }
  const int64_t all = splits.all.size(), before = tiles.size();
  const DynamicThreads threads(std::min<int64_t>(torch::stable::get_num_threads(), before + all),
                               workspace);
  const int64_t parts = all > 0 ? threads.threads() * (p.cu_seqlens_q ? kParts : 1) : 0;
  const auto first_of = [&](int64_t part) {
    const int64_t least = splits.work * part / parts;
    return std::partition_point(splits.all.data(), splits.all.data() + all,
                                [&](const Split& split) { return split.middle < least; });
  };
  threads.run(before + parts, [&](int64_t n, float* space) {
    if (n < before) return tiles[n].chunk->run(tiles[n].index, space);
    const Split* first = first_of(n - before);
    run.decode(p, first, first_of(n - before + 1) - first);
  });
}

inline void run_decode(DecodeParams& p, const DecodeKernels& run) {
  const Work work = cut(p);
  const Splits splits = splits_of(p, work.blocks);
  const std::unique_ptr<float[]> partial(new float[work.partials * (p.cache.head_dim_v + 2)]);
  p.partial = partial.get();
  if (p.cu_seqlens_q) fill_padding(p);
  const int64_t merges = work.blocks.size();
  if (work.chunks.empty() && splits.logits <= kFewLogits) {
    run.decode(p, splits.all.data(), splits.all.size());
    run.merge(p, work.blocks.data(), merges);
    return;
  }
  run_parts(p, run, work, splits);
  torch::stable::parallel_for(0, merges, 1, [&](int64_t begin, int64_t end) {
    run.merge(p, work.blocks.data() + begin, end - begin);
  });
}

}  // namespace extrope::decode
