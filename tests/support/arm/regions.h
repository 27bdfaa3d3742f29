// Score methods as kernels see them: those of extrope_kernels/scores.
#pragma once

#include <cmath>
#include <vector>

#include "common/regions.h"

namespace extrope {
namespace {

constexpr int64_t kFirstKey = -(int64_t{1} << 62);
constexpr PositionMap kSame{};
constexpr PositionMap kUnrotated = PositionMap::constant(0);

inline Regions rope() { return {1, 1, {{kFirstKey, kSame, kSame}}, kUnrotated, kUnrotated}; }

inline Regions rerope(int64_t window) {
  const PositionMap far = PositionMap::constant(static_cast<double>(window));
  return {2, 1, {{kFirstKey, far, kUnrotated}, {1 - window, kSame, kSame}}, kUnrotated, kUnrotated};
}

inline Regions self_extend(int64_t window, int64_t group) {
  const double offset = static_cast<double>(window - window / group);
  const PositionMap q{MapKind::kGrouped, 0, static_cast<double>(group), true, offset};
  const PositionMap k{MapKind::kGrouped, 0, static_cast<double>(group), true};
  return {2, 1, {{kFirstKey, q, k}, {1 - window, kSame, kSame}}, kUnrotated, kUnrotated};
}

// Divisors and offsets of 32 pairs: those of queries, then of keys.
inline const std::vector<double>& groups_of_pairs(int64_t window) {
  static const std::vector<double> table = [&] {
    std::vector<double> values;
    for (int64_t n = 0; n < 128; ++n) {
      const int64_t part = n / 32, group = 1 + n % 32 % 7;
      const int64_t offset = part == 1 ? window - window / group : 0;
      values.push_back(static_cast<double>(part % 2 == 0 ? group : offset));
    }
    return values;
  }();
  return table;
}

// As self_extend, with groups of each pair.
inline Regions groups_by_pair() {
  constexpr int64_t kWindow = 40;
  const PositionMap q{.kind = MapKind::kPerPair, .floor = true, .row = 0};
  const PositionMap k{.kind = MapKind::kPerPair, .floor = true, .row = 1};
  Regions regions{2, 1, {{kFirstKey, q, k}, {1 - kWindow, kSame, kSame}}, kUnrotated, kUnrotated};
  regions.pair_maps = {groups_of_pairs(kWindow).data(), 32};
  return regions;
}

// Three regions whose starts are shared by blocks of queries, as dual chunk attention has.
inline Regions chunked(int64_t chunk) {
  const double size = static_cast<double>(chunk);
  const PositionMap in_chunk{MapKind::kShifted, chunk};
  const PositionMap next{MapKind::kCapped, chunk, 1.0, false, size, 1.5 * size};
  const PositionMap last = PositionMap::constant(1.5 * size);
  return {3,
          chunk,
          {{kFirstKey, last, in_chunk}, {-chunk, next, in_chunk}, {0, in_chunk, in_chunk}},
          kUnrotated,
          kUnrotated};
}

}  // namespace
}  // namespace extrope
