// The sum of a vector's lanes.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

template <int Distance, typename V, int... I>
inline V moved_by(V v, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(v, typename Lanes<V>::Index{(I ^ Distance)...});
}

template <int Distance = 1, typename V>
inline auto sum_of(V v) {
  if constexpr (Distance == Lanes<V>::count) {
    return v[0];
  } else {
    constexpr std::make_integer_sequence<int, Lanes<V>::count> all;
    return sum_of<2 * Distance>(v + moved_by<Distance>(v, all));
  }
}

}  // namespace
}  // namespace extrope
