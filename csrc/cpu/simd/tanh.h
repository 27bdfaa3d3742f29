// tanh on a vector of floats.
#pragma once

#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

// b where either is NaN.
inline floats lesser(floats a, floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// scale * tanh(x) for a scale >= 0, never past scale: relative error below 6e-7 up to 7.9, from
// where on tanh is within as much of 1. NaN stays NaN.
inline floats scaled_tanh(floats x, float scale) {
  constexpr float kLast = 7.9f;
  x = lesser(floats{} + kLast, larger(floats{} - kLast, x));
  const floats u = x * x;
  // x * P(u) / Q(u), minimax in the relative error. Leading coefficients are 1, and their quotient
  // goes into the scale, which has to be multiplied in anyway.
  const floats p = ((u + 0x1.00b8ccp8f) * u + 0x1.5e8238p13f) * u + 0x1.52bc86p16f;
  const floats q =
      (((u + 0x1.e175acp9f) * u + 0x1.75d5bap16f) * u + 0x1.c52f1cp20f) * u + 0x1.e9bdeap21f;
  return x * (scale * 0x1.721f4ep5f) * p / q;
}

}  // namespace
}  // namespace extrope
