// Writes new keys and values into a cache, keys rotated as the score stores them.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/append/writes.h"
#include "cpu/decode/params.h"

namespace extrope::decode {

// Returns stored positions of the tokens at `positions` under a map of pairs, in one head: (pairs,
// tokens).
inline std::vector<double> places_of_pairs(const PairMaps& maps, const PositionMap& map,
                                           int64_t head, int64_t pairs,
                                           const std::vector<int64_t>& positions) {
  std::vector<double> places;
  places.reserve(pairs * positions.size());
  for (int64_t i = 0; i < pairs; ++i) {
    const double divisor = maps.divisors(map, head)[i], offset = maps.offsets(map, head)[i];
    for (const int64_t position : positions) {
      places.push_back(map.place(map.remainder(position), divisor, offset));
    }
  }
  return places;
}

// Returns the same rotation for only one head.
inline RopeParams of_head(RopeParams p, int64_t head) {
  RopeTensor& x = p.tensors[0];
  const int64_t bytes = element_bytes(p.dtype);
  x.in = static_cast<const char*>(x.in) + head * x.in_head * bytes;
  x.out = static_cast<char*>(x.out) + head * x.out_head * bytes;
  p.inv_freq = static_cast<const double*>(p.inv_freq) + head * p.freq_head;
  x.heads = p.angle_heads = 1, p.freq_head = 0;
  return p;
}

// Rotates by positions by axis, with an axis per pair; heads with different maps run one by one.
inline void run_append_by_pair(RopeParams p, const Regions& regions,
                               const std::vector<int64_t>& positions, const CacheWrites& writes,
                               const Plane& v) {
  const PairMaps& maps = regions.pair_maps;
  std::vector<int32_t> axes(p.rotary_dim / 2);
  std::iota(axes.begin(), axes.end(), 0);
  p.axes = axes.data(), p.num_axes = p.rotary_dim / 2, p.position_axis = positions.size();
  for (int64_t head = 0; head < maps.heads; ++head) {
    const std::vector<double> places =
        places_of_pairs(maps, regions.stored, head, p.num_axes, positions);
    RopeParams part = maps.heads > 1 ? of_head(p, head) : p;
    set_token_positions(part, places);
    Rotations keys;
    keys.add(part);
    head + 1 < maps.heads ? keys.run() : writes.run(keys, v);
  }
}

// Appends raw new keys, and values. log_decay: as in RopeParams.
inline void run_append(const KVCache& cache, const Frequencies& freqs, const float* log_decay,
                       const Regions& regions, const Plane& k, const Plane& v) {
  const int64_t tokens = cache.all_new_tokens(), batch = cache.cu_new ? 1 : cache.batch;
  const int64_t seqlen = cache.cu_new ? tokens : cache.appended;
  const CacheRows rows = rows_behind(cache, tokens);
  std::vector<double> places;
  RopeParams p = unrotated(cache.dtype, k, batch, seqlen, cache.heads, cache.head_dim);
  CacheWrites writes(cache, rows, batch, seqlen);
  writes.take_keys(p.tensors[0]);
  if (!is_raw(regions.stored)) {
    p.rotary_dim = 2 * freqs.half, p.interleaved = freqs.interleaved;
    p.inv_freq = freqs.inv_freq, p.inv_freq_is_f64 = true;
    p.freq_batch = freqs.batch, p.freq_head = freqs.head(), p.angle_heads = freqs.heads;
    p.log_decay = log_decay;
    p.cu_seqlens = cache.cu_new, p.num_sequences = cache.batch;
    const std::vector<int64_t> positions = positions_behind(cache, tokens);
    if (regions.stored.is_of_pairs()) return run_append_by_pair(p, regions, positions, writes, v);
    places = mapped(regions.stored, positions);
    set_token_positions(p, places);
  }
  Rotations all;
  all.add(p);
  writes.run(all, v);
}

}  // namespace extrope::decode
