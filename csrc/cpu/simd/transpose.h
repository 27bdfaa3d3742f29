// Transposes a square of words in vector registers.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

// Exchanges blocks of Size x Size words across the diagonal of blocks twice that size.
template <int Size, int... I>
EXTROPE_INLINE void exchange(words (&x)[kFloats], std::integer_sequence<int, I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) {
    if (i & Size) continue;
    const words a = x[i], b = x[i + Size];
    x[i] = __builtin_shuffle(a, b, ints{(I & Size ? kFloats + I - Size : I)...});
    x[i + Size] = __builtin_shuffle(a, b, ints{(I & Size ? kFloats + I : I + Size)...});
  }
}

EXTROPE_INLINE void transpose(words (&x)[kFloats]) {
  constexpr std::make_integer_sequence<int, kFloats> all;
  if constexpr (kFloats > 8) exchange<8>(x, all);
  if constexpr (kFloats > 4) exchange<4>(x, all);
  exchange<2>(x, all);
  exchange<1>(x, all);
}

}  // namespace
}  // namespace extrope
