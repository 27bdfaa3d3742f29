// The softcap of logits with its derivative, and sinks, for attention with and without a cache.
#pragma once

#include <algorithm>

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

// Up to this square of x, tanh has a polynomial; most logits are that near to 0 in units of their
// cap.
constexpr float kNear = 0.75f;

// Returns scale * tanh(x) for squares up to kNear. Minimax in the relative error, below 1.2e-7.
EXTROPE_INLINE floats tanh_near(floats x, floats square, float scale) {
  floats sum = square * (scale * 0x1.6dd7f8p-10f) - scale * 0x1.ce470ap-8f;
  sum = sum * square + scale * 0x1.58f9p-6f;
  sum = sum * square - scale * 0x1.b885b6p-5f;
  sum = sum * square + scale * 0x1.1105b6p-3f;
  sum = sum * square - scale * 0x1.55551ep-2f;
  return x * (sum * square + scale);
}

// Returns scale * tanh(x) for larger squares, at most scale, as scale - 2 * scale / (e**2|x| + 1)
// with the sign of x: so its error falls to half a unit of the last place where tanh nears 1. NaN
// stays NaN.
inline floats tanh_far(floats x, float scale) {
  constexpr float kLast = 9.1f,
                  kTwoLog2E = 2.8853900817779268f;  // tanh is 1 in float from kLast on
  const words sign = bits_as<words>(x) & 0x80000000;
  const floats size = lesser(floats{} + kLast, bits_as<floats>(bits_as<words>(x) & 0x7fffffff));
  const floats result = scale - 2.0f * scale / (exp2_vector(size * kTwoLog2E) + 1.0f);
  return bits_as<floats>(bits_as<words>(result) | sign);
}

// Not inlined: its constants would take the registers of a product's sums.
[[gnu::noinline]] inline void apply_softcap_anywhere(floats* x, int count, float cap) {
  for (int i = 0; i < count; ++i) {
    const floats square = x[i] * x[i], far = tanh_far(x[i], cap);
    x[i] = square <= kNear ? tanh_near(x[i], square, cap) : far;
  }
}

// The softcap: x becomes cap * tanh(x), for x = logits / softcap. To base 2, log2(e) is in `cap`.
template <int Count>
EXTROPE_INLINE void apply_softcap(floats (&x)[Count], float cap) {
  floats squares[Count], all{};
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) all += squares[i] = x[i] * x[i];
  if (all_within(all, kNear)) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) x[i] = tanh_near(x[i], squares[i], cap);
  } else {
    floats any[Count];  // a copy, so that x may stay in registers
    std::copy_n(x, Count, any);
    apply_softcap_anywhere(any, Count, cap);
    std::copy_n(any, Count, x);
  }
}

// The softcap as above, and its derivative by the logits: slopes[i] = 1 - tanh(x[i])**2.
template <int Count>
EXTROPE_INLINE void apply_softcap_with_slopes(floats (&x)[Count], float cap,
                                              floats (&slopes)[Count]) {
  apply_softcap(x, cap);  // the forward's bits: lse is of them
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) {
    const floats tanh = x[i] * (1.0f / cap);
    slopes[i] = 1.0f - tanh * tanh;
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
