// Writes new keys and values into a cache before the attention over it.
#pragma once

#include "cpu/append/append.h"
#include "cpu/decode/params.h"

namespace extrope::decode {

// Appends raw new keys, rotated as the score stores them, and values. log_decay: as in RopeParams.
inline void run_append(const KVCache& cache, const Frequencies& freqs, const float* log_decay,
                       const Regions& regions, const Plane& k, const Plane& v) {
  const int64_t tokens = cache.all_new_tokens(), batch = cache.cu_new ? 1 : cache.batch;
  const int64_t seqlen = cache.cu_new ? tokens : cache.appended;
  Append append(cache, rows_behind(cache, tokens), batch, seqlen);
  append.refuse_overlap("decode", "k", k, cache.heads, cache.head_dim);
  append.refuse_overlap("decode", "v", v, cache.heads, cache.head_dim_v);
  RopeNormParams keys = unrotated(cache.dtype, k, batch, seqlen, cache.heads, cache.head_dim);
  if (!is_raw(regions.stored)) {
    keys.rotary_dim = 2 * freqs.half, keys.interleaved = freqs.interleaved;
    keys.rotary_offset = freqs.rotary_offset;
    keys.inv_freq = freqs.inv_freq, keys.inv_freq_is_f64 = true;
    keys.freq_batch = freqs.batch, keys.freq_head = freqs.head(), keys.angle_heads = freqs.heads;
    keys.log_decay = log_decay;
    keys.cu_seqlens = cache.cu_new, keys.num_sequences = cache.batch;
  }
  append.add_keys(keys, regions.stored, regions.pair_maps, positions_behind(cache, tokens));
  append.run(v);
}

}  // namespace extrope::decode
