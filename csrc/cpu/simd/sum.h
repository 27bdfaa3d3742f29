// Sums over the lanes of vectors.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

template <int Distance, typename V, int... I>
EXTROPE_INLINE V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
  using Index = typename Lanes<V>::Index;
  constexpr int n = Lanes<V>::count;
  return __builtin_shuffle(a, b, Index{(I & Distance ? n + I - Distance : I)...}) +
         __builtin_shuffle(a, b, Index{(I & Distance ? n + I : I + Distance)...});
}

template <int Distance, typename V, int... I>
inline V across(V v, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(v, typename Lanes<V>::Index{(I ^ Distance)...});
}

// Exchanges lanes at this distance, by pairs.
template <int Distance, typename V>
inline V across(V v) {
  return across<Distance>(v, std::make_integer_sequence<int, Lanes<V>::count>{});
}

// Lane i of the result is the sum of the lanes of v[i % Count]; Count is a power of two, and at
// most the number of lanes.
template <int Distance = 1, typename V, int Count>
EXTROPE_INLINE V sums_of(const V (&v)[Count]) {
  if constexpr (Count > 1) {
    constexpr auto kAll = std::make_integer_sequence<int, Lanes<V>::count>{};
    V half[Count / 2];
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i) {
      half[i] = add_pairs<Distance>(v[2 * i], v[2 * i + 1], kAll);
    }
    return sums_of<2 * Distance>(half);
  } else if constexpr (Distance < Lanes<V>::count) {
    const V both[1] = {v[0] + across<Distance>(v[0])};
    return sums_of<2 * Distance>(both);
  } else {
    return v[0];
  }
}

// out[i] = the sum of the lanes of v[i]; Count is a multiple of the lanes.
template <int Count>
EXTROPE_INLINE void sum_lanes(const floats* v, float* out) {
  static_assert(Count % kFloats == 0);
  for (int first = 0; first < Count; first += kFloats) {
    floats some[kFloats];
#pragma GCC unroll 16
    for (int i = 0; i < kFloats; ++i) some[i] = v[first + i];
    store(out + first, sums_of(some));
  }
}

template <typename V>
inline auto sum_of(V v) {
  const V one[1] = {v};
  return sums_of(one)[0];
}

}  // namespace
}  // namespace extrope
