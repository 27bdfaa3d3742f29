// Writes new keys and values into a cache before the attention over it.
#pragma once

#include "cpu/cache/append.h"
#include "cpu/decode/params.h"

namespace extrope::decode {

// Appends new keys, rotated as the score stores them, and values. log_decay: as in RopeParams.
inline void run_append(const DecodeParams& p, const float* log_decay, const Plane& k,
                       const Plane& v) {
  const KVCache& cache = p.cache;
  const Frequencies& freqs = p.freqs;
  const PositionMap& stored = p.regions.stored;
  const int64_t tokens = cache.all_new_tokens(), batch = cache.cu_new ? 1 : cache.batch;
  const int64_t seqlen = cache.cu_new ? tokens : cache.appended;
  Append append(cache, rows_behind(cache, tokens), batch, seqlen);
  const Plane q{const_cast<void*>(p.q), p.q_stride_batch, p.q_stride_seq, p.q_stride_head};
  append.refuse_overlap("decode", "q", q, p.heads_q, cache.head_dim);
  append.refuse_overlap("decode", "k", k, cache.heads, cache.head_dim);
  append.refuse_overlap("decode", "v", v, cache.heads, cache.head_dim_v);
  RopeParams keys = unrotated(cache.dtype, k, batch, seqlen, cache.heads, cache.head_dim);
  if (!(stored == p.regions.q_stored)) {  // else the cache has keys as they come, like queries
    keys.rotary_dim = 2 * freqs.half, keys.interleaved = freqs.interleaved;
    keys.rotary_offset = freqs.rotary_offset;
    keys.inv_freq = freqs.inv_freq, keys.inv_freq_is_f64 = true;
    keys.freq_batch = freqs.batch, keys.freq_head = freqs.head(), keys.angle_heads = freqs.heads;
    keys.log_decay = log_decay;
    keys.cu_seqlens = cache.cu_new, keys.num_sequences = cache.batch;
  }
  append.add_keys(keys, stored, positions_behind(cache, tokens));
  append.run(v);
}

}  // namespace extrope::decode
