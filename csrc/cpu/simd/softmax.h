// The softcap of logits with its derivative, and sinks, for attention with and without a cache.
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

// The softcap: x becomes cap * tanh(x), for x = logits / softcap. To base 2, log2(e) is in `cap`.
// If all values are near 0, as most logits are in units of their cap, a polynomial takes half the
// operations; it is minimax in the relative error, below 3e-7.
template <int Count>
EXTROPE_INLINE void apply_softcap(floats (&x)[Count], float cap) {
  floats squares[Count], all{};
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) all += squares[i] = x[i] * x[i];
  if (all_within(all, 0.75f)) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) {
      const floats u = squares[i];
      floats sum = u * (cap * -0x1.036338p-8f) + cap * 0x1.2f1512p-6f;
      sum = sum * u - cap * 0x1.b0a95cp-5f;
      sum = sum * u + cap * 0x1.10b32ep-3f;
      sum = sum * u - cap * 0x1.5552eap-2f;
      sum = sum * u + cap;
      x[i] = x[i] * sum;
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) x[i] = scaled_tanh(x[i], cap);
  }
}

// The softcap as above, and its derivative by the logits: slopes[i] = 1 - tanh(x[i])**2.
template <int Count>
EXTROPE_INLINE void apply_softcap_with_slopes(floats (&x)[Count], float cap,
                                              floats (&slopes)[Count]) {
  apply_softcap(x, 1.0f);
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) {
    slopes[i] = 1.0f - x[i] * x[i];
    x[i] *= cap;
  }
}

// Adds a sink to a row. `scale` is the factor of the sums over its keys; lse is the log-sum-exp of
// its logits, -inf for a row without keys.
inline void join_sink(float sink, float& scale, float& lse) {
  if (lse == -__builtin_inff()) {
    lse = sink;
    return;
  }
  const float above = sink - lse, ratio = __builtin_expf(above);
  scale /= 1.0f + ratio;
  lse = above > 0 ? sink + __builtin_log1pf(__builtin_expf(-above)) : lse + __builtin_log1pf(ratio);
}

}  // namespace
}  // namespace extrope
