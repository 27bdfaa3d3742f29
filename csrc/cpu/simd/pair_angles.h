// Cosines and sines of one token whose pairs of dims go to places of their own.
#pragma once

#include <cmath>

#include "common/regions.h"
#include "common/softmax_params.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

// Adds sign * map_i(position) to the place of each pair i.
inline void add_places(const PairMaps& maps, const PositionMap& map, int64_t head, int64_t position,
                       double sign, double* places) {
  if (!map.is_of_pairs()) {
    const double place = sign * map(position);
    for (int64_t i = 0; i < maps.padded; ++i) places[i] += place;
    return;
  }
  const double p = map.remainder(position);
  const double *divisors = maps.divisors(map, head), *offsets = maps.offsets(map, head);
  for (int64_t i = 0; i < maps.padded; ++i) {
    places[i] += sign * map.place(p, divisors[i], offsets[i]);
  }
}

// As fill_sincos, of the token at `position` in one head of k: at to_i(position) - from_i(position)
// for pair i. inv_freq: of this head.
inline void fill_pairs(const PairMaps& maps, const PositionMap& to, const PositionMap& from,
                       int64_t head, int64_t position, const double* inv_freq, int64_t half,
                       double amplitude, float* cos, float* sin) {
  alignas(64) double angles[kMaxHeadDim / 2] = {};
  add_places(maps, to, head, position, 1.0, angles);
  add_places(maps, from, head, position, -1.0, angles);
  for (int64_t i = 0; i < maps.padded; ++i) angles[i] *= inv_freq[i];
  fill_sincos(angles, half, Angles{.position = 1.0, .amplitude = amplitude}, cos, sin);
}

}  // namespace
}  // namespace extrope
