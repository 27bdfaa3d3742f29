// Cuts attention over a cache into splits, and shares these and appended tokens out over torch's
// threads.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/decode/kernels.h"
#include "cpu/runtime/threads.h"

namespace extrope::decode {

constexpr int64_t kBlockM = 64;  // query rows of a head of k that share one reading of the cache
constexpr int64_t kSplitSize = 256;    // keys
constexpr int64_t kFewScores = 4'096;  // below it a second thread costs more than it saves

struct Kernels {
  void (*append)(const AppendParams&, int64_t, int64_t);
  void (*decode)(const DecodeParams&, const Split*, int64_t);
  void (*merge)(const DecodeParams&, const QueryBlock*, int64_t);
};

// The splits depend on the lengths alone, not on the threads: neither does the result.
inline std::vector<QueryBlock> cut(const DecodeParams& p) {
  const int64_t tokens = std::max<int64_t>(1, kBlockM / (p.heads_q / p.cache.heads));
  const int64_t split_size = kSplitSize * ((p.seqlen_q + tokens - 1) / tokens);
  std::vector<QueryBlock> all;
  int64_t partial = 0;
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    const int64_t first_slot = p.cache.first_slot(b);
    const int64_t length = std::max<int64_t>(p.cache.end(b) - first_slot, 0);
    for (int64_t first = 0; first < p.seqlen_q; first += tokens) {
      const int64_t last = std::min(first + tokens, p.seqlen_q), before = length - p.seqlen_q;
      const int64_t first_key = p.regions.start(0, before + first);
      const int64_t keys = std::max<int64_t>(before + last - first_key, 0);
      const int64_t splits = (keys + split_size - 1) / split_size;
      all.push_back({b, first, last, first_slot, length, first_key, split_size, splits, partial});
      partial += splits * (last - first) * p.heads_q;
    }
  }
  return all;
}

inline void run_append(const AppendParams& p, const Kernels& run) {
  const KVCache& cache = p.cache;
  const int64_t bytes = 2 * cache.heads * cache.head_dim * (cache.dtype == DType::f32 ? 4 : 2);
  share_out(cache.batch * cache.appended, bytes,
            [&](int64_t begin, int64_t end) { run.append(p, begin, end); });
}

inline void run_decode(DecodeParams& p, const Kernels& run) {
  const std::vector<QueryBlock> blocks = cut(p);
  std::vector<Split> splits;
  int64_t partials = 0, scores = 0;
  for (const QueryBlock& block : blocks) {
    const int64_t rows = (block.last_token - block.first_token) * p.heads_q;
    partials += block.num_splits * rows;
    scores += (block.length - block.first_key) * rows;
    for (int64_t n = 0; n < block.num_splits; ++n) splits.push_back({&block, n});
  }
  const std::unique_ptr<float[]> partial(new float[partials * (p.cache.head_dim + 2)]);
  p.partial = partial.get();
  const int64_t all = splits.size(), merges = blocks.size();
  if (scores <= kFewScores) {
    run.decode(p, splits.data(), all);
    run.merge(p, blocks.data(), merges);
    return;
  }
  torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    run.decode(p, splits.data() + begin, end - begin);
  });
  torch::stable::parallel_for(0, merges, 1, [&](int64_t begin, int64_t end) {
    run.merge(p, blocks.data() + begin, end - begin);
  });
}

}  // namespace extrope::decode
