// 2**x on a vector of floats.
#pragma once

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

// Returns the larger; b if either is NaN.
inline floats larger(floats a, floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Returns 2**x for x up to 127: relative error below 8.5e-8, or 1.1e-7 without fma; exactly 1 at 0,
// exactly 0 from -127 down.
inline floats exp2_vector(floats x) {
  // Adding it leaves the rounded integer in the low bits, with the bias of an exponent.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  x = larger(floats{} - 127.0f, x);
  const floats shifted = x + kRound;
  const floats f = x - (shifted - kRound);  // within half of 0
  // Minimax in the relative error, with the constant term fixed at 1.
  floats sum = f * 0x1.470b48p-13f + 0x1.5f7276p-10f;
  sum = sum * f + 0x1.3b270ep-7f;
  sum = sum * f + 0x1.c6ae72p-5f;
  sum = sum * f + 0x1.ebfbe2p-3f;
  sum = sum * f + 0x1.62e432p-1f;
  sum = sum * f + 1.0f;
  // A product, since a sum of bits could turn a NaN with a payload into a number.
  return sum * bits_as<floats>(bits_as<words>(shifted) << 23);
}

}  // namespace
}  // namespace extrope
