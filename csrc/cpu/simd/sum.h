// Sums over the lanes of vectors.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

template <int Distance, typename V, int... I>
inline V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
  using Index = typename Lanes<V>::Index;
  constexpr int n = Lanes<V>::count;
  return __builtin_shuffle(a, b, Index{(I & Distance ? n + I - Distance : I)...}) +
         __builtin_shuffle(a, b, Index{(I & Distance ? n + I : I + Distance)...});
}

// Lane i of the result is the sum of the lanes of v[i], of as many vectors as one has lanes.
template <int Distance = 1, typename V, int Count>
inline V sums_of(const V (&v)[Count]) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    V half[Count / 2];
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i) {
      half[i] = add_pairs<Distance>(v[2 * i], v[2 * i + 1],
                                    std::make_integer_sequence<int, Lanes<V>::count>{});
    }
    return sums_of<2 * Distance>(half);
  }
}

// out[i] = the sum of the lanes of v[i]; Count is a multiple of the lanes.
template <int Count>
inline void sum_lanes(const floats* v, float* out) {
  static_assert(Count % kFloats == 0);
  for (int first = 0; first < Count; first += kFloats) {
    floats some[kFloats];
#pragma GCC unroll 16
    for (int i = 0; i < kFloats; ++i) some[i] = v[first + i];
    store(out + first, sums_of(some));
  }
}

template <int Distance = 1, typename V>
inline auto sum_of(V v) {
  if constexpr (Distance == Lanes<V>::count) {
    return v[0];
  } else {
    return sum_of<2 * Distance>(
        add_pairs<Distance>(v, v, std::make_integer_sequence<int, Lanes<V>::count>{}));
  }
}

}  // namespace
}  // namespace extrope
