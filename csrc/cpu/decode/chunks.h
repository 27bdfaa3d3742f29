// Long chunks of queries over a cache: each is an attention in tiles (cpu/attention) that reads
// keys and values from the cache. A tile takes hundreds of rows, a split four at a time: tiles read
// the cache less often.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/attention/rotated_keys.h"
#include "cpu/attention/run.h"
#include "cpu/decode/params.h"

namespace extrope::decode {

// The fewest rows of a head of k for a chunk. Fewer would give too few tiles for many threads;
// splits cut the keys too.
constexpr int64_t kChunkRows = 256;

inline bool is_chunk(const DecodeParams& p, int64_t tokens) {
  return tokens * (p.heads_q / p.cache.heads) >= kChunkRows;
}

// The tokens begin..end-1 of one sequence, in q's entry `batch`.
struct ChunkTokens {
  int64_t sequence, batch, begin, end;
};

class QueryChunk {
 public:
  QueryChunk(const DecodeParams& p, const ChunkTokens& tokens)
      : p_(params_of(p, tokens)),
        rotation_(p_, rotation_of(p, tokens.sequence), attention::rotates_ahead(p_.dtype)),
        kernels_(attention::kernels(p_.dtype)),
        plan_(kernels_.plan(p_)),
        tiles_(attention::forward_tiles(p_, plan_)) {}
  QueryChunk(const QueryChunk&) = delete;

  int64_t tiles() const { return tiles_.size(); }
  int64_t workspace() const { return plan_.workspace; }
  void run(int64_t tile, float* workspace) const {
    kernels_.tile(p_, tiles_[tile], plan_, workspace);
  }

 private:
  AttentionParams params_of(const DecodeParams& p, const ChunkTokens& t) {
    const KVCache& cache = p.cache;
    const int64_t bytes = cache.dtype == DType::f32 ? 4 : 2, cached = cache.is_e4m3() ? 1 : bytes;
    const int64_t first_slot = cache.first_slot(t.sequence);
    const auto at = [](const void* data, int64_t bytes) {
      return const_cast<char*>(static_cast<const char*>(data)) + bytes;
    };
    AttentionParams a{};
    a.dtype = cache.dtype;
    a.batch = 1, a.seqlen_q = t.end - t.begin;
    a.seqlen_k = std::max<int64_t>(cache.end(t.sequence) - first_slot, 0);
    a.heads_q = p.heads_q, a.heads_k = cache.heads, a.head_dim = cache.head_dim;
    a.q_start.offset = a.seqlen_k - a.seqlen_q;
    a.regions = p.regions;
    a.regions.trim(a.seqlen_k);
    static_cast<SoftmaxParams&>(a) = p;
    if (a.query_scale.data)
      a.query_scale.data += t.batch * a.query_scale.batch + t.begin * a.query_scale.seq;
    a.rotation = p.freqs.of_rows(a.head_dim);
    a.q = {at(p.q, (t.batch * p.q_stride_batch + t.begin * p.q_stride_seq) * bytes), 0,
           p.q_stride_seq, p.q_stride_head, a.head_dim};
    const int64_t token = t.batch * p.seqlen_q + t.begin, row = cache.head_dim_v;
    a.out = {at(p.out, token * a.heads_q * row * bytes), 0, a.heads_q * row, row, row};
    a.k_scale = cache.k_scale, a.v_scale = cache.v_scale;
    a.lse = p.lse + t.batch * a.heads_q * p.seqlen_q + t.begin, a.lse_head = p.seqlen_q;
    const auto in_cache = [&](const Plane& plane, int64_t head_dim, std::vector<int64_t>& rows) {
      rows = rows_of(cache, plane, t.sequence, a.seqlen_k);
      const int64_t first = t.sequence * plane.block + first_slot * plane.slot;
      AttentionTensor x{at(plane.data, rows.empty() ? first * cached : 0), 0, plane.slot,
                        plane.head, head_dim};
      if (!rows.empty()) x.rows = rows.data();
      x.is_e4m3 = cache.is_e4m3();
      return x;
    };
    std::fill_n(a.k, kMaxRegions, in_cache(cache.k, cache.head_dim, k_rows_));
    a.v = in_cache(cache.v, cache.head_dim_v, v_rows_);
    return a;
  }

  // Returns the first element of each key's row; empty if a stride is enough.
  static std::vector<int64_t> rows_of(const KVCache& cache, const Plane& plane, int64_t sequence,
                                      int64_t keys) {
    std::vector<int64_t> rows;
    if (!cache.block_table) return rows;
    rows.reserve(keys);
    const int32_t* pages = cache.block_table + sequence * cache.table_batch;
    int64_t in_page = cache.first_slot(sequence) % cache.page_size;
    pages += cache.first_slot(sequence) / cache.page_size;
    for (int64_t n = 0; n < keys; ++n, ++in_page) {
      if (in_page == cache.page_size) in_page = 0, ++pages;
      rows.push_back(*pages * plane.block + in_page * plane.slot);
    }
    return rows;
  }

  static attention::RotationArgs rotation_of(const DecodeParams& p, int64_t sequence) {
    const Frequencies& freqs = p.freqs;
    PaddedRows rows{1, freqs.heads, freqs.half, freqs.padded, {}};
    const double* inv_freq = freqs.inv_freq + sequence * freqs.batch;
    rows.values.assign(inv_freq, inv_freq + freqs.heads * freqs.padded);
    std::vector<double> decay;
    if (freqs.log_decay) decay.assign(freqs.log_decay, freqs.log_decay + freqs.padded);
    return {std::move(rows), std::move(decay), p.amplitude};
  }

  std::vector<int64_t> k_rows_, v_rows_;
  AttentionParams p_;
  const attention::RotationTables rotation_;
  const attention::AttentionKernels kernels_;
  const TilePlan plan_;
  const std::vector<QueryTile> tiles_;
};

}  // namespace extrope::decode
