// tanh on a vector of floats.
#pragma once

#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

// Returns the lesser; b if either is NaN.
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

// Returns true if every lane is at most `bound`; a NaN is not.
inline bool all_within(floats x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, floats{} + bound, _CMP_NLE_UQ) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, floats{} + bound, _CMP_NLE_UQ)) == 0;
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpnle_ps(x, floats{} + bound)) == 0;
#else
  bool within = true;
  for (int i = 0; i < kFloats; ++i) within &= x[i] <= bound;
  return within;
#endif
}

// Returns scale * tanh(x) for a scale >= 0, at most scale. The relative error is below 6e-7 up to
// 7.9; beyond, tanh is that close to 1. NaN stays NaN.
inline floats scaled_tanh(floats x, float scale) {
  constexpr float kLast = 7.9f;
  x = lesser(floats{} + kLast, larger(floats{} - kLast, x));
  const floats u = x * x;
  // x * P(u) / Q(u), minimax in the relative error. Leading coefficients are 1; the scale, which is
  // multiplied in anyway, includes their quotient.
  const floats p = ((u + 0x1.00b8ccp8f) * u + 0x1.5e8238p13f) * u + 0x1.52bc86p16f;
  const floats q =
      (((u + 0x1.e175acp9f) * u + 0x1.75d5bap16f) * u + 0x1.c52f1cp20f) * u + 0x1.e9bdeap21f;
  return x * (scale * 0x1.721f4ep5f) * p / q;
}

// Computes the same for several vectors. If all values are near 0, as most logits are in units of
// their cap, a polynomial takes half the operations; it is minimax in the relative error, below
// 3e-7.
template <int Count>
EXTROPE_INLINE void scaled_tanhs(floats (&x)[Count], float scale) {
  floats squares[Count], all{};
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) all += squares[i] = x[i] * x[i];
  if (all_within(all, 0.75f)) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) {
      const floats u = squares[i];
      floats sum = u * (scale * -0x1.036338p-8f) + scale * 0x1.2f1512p-6f;
      sum = sum * u - scale * 0x1.b0a95cp-5f;
      sum = sum * u + scale * 0x1.10b32ep-3f;
      sum = sum * u - scale * 0x1.5552eap-2f;
      sum = sum * u + scale;
      x[i] = x[i] * sum;
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) x[i] = scaled_tanh(x[i], scale);
  }
}

}  // namespace
}  // namespace extrope
