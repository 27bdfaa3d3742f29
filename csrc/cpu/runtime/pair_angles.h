// Angles of a token whose pairs of dims have their own places.
#pragma once

#include <cstdint>

#include "common/regions.h"
#include "common/softmax_params.h"

namespace extrope {
namespace {

// Adds sign * map_i(position) to the place of each pair i.
inline void add_places(const PairMaps& maps, const PositionMap& map, int64_t position, double sign,
                       double* places) {
  if (!map.is_of_pairs()) {
    const double place = sign * map(position);
    for (int64_t i = 0; i < maps.padded; ++i) places[i] += place;
    return;
  }
  const double p = map.remainder(position);
  const double *divisors = maps.divisors(map), *offsets = maps.offsets(map);
  for (int64_t i = 0; i < maps.padded; ++i) {
    places[i] += sign * map.place(p, divisors[i], offsets[i]);
  }
}

// The angles of a token at `position`, if pairs have their own places:
// inv_freq[i] * (to_i(position) - from_i(position)), for fill_sincos at position 1.
class PairAngles {
 public:
  // Not inlined, since few calls need it: the loops of all others stay small.
  [[gnu::noinline]] const double* fill(const PairMaps& maps, const PositionMap& to,
                                       const PositionMap& from, int64_t position,
                                       const double* inv_freq) {
    for (int64_t i = 0; i < maps.padded; ++i) at_[i] = 0;
    add_places(maps, to, position, 1.0, at_);
    add_places(maps, from, position, -1.0, at_);
    for (int64_t i = 0; i < maps.padded; ++i) at_[i] *= inv_freq[i];
    return at_;
  }

 private:
  alignas(64) double at_[kMaxHeadDim / 2];
};

}  // namespace
}  // namespace extrope
