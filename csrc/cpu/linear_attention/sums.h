// Sums of products of decayed linear attention, and the order in which they are added up.
#pragma once

#include "cpu/simd/gemm.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// Dims, and keys of a sum of keys, that are added up one after the other before their sum joins
// the rest: in a long chain the roundings of terms of one sign, or of feature maps that are all
// eps, do not average out.
constexpr int64_t kTerms = 32, kTokens = 16;

inline float total(floats v) {
  if constexpr (kFloats == 16) v += across<8>(v);
  if constexpr (kFloats >= 8) v += across<4>(v);
  v += across<2>(v);
  return (v + across<1>(v))[0];
}

template <int... I>
inline ints below(int32_t count, std::integer_sequence<int, I...>) {
  return ints{I...} < count;
}

// A mask of the first `count` lanes of a vector, or of all.
inline ints first_lanes(int64_t count) {
  return below(static_cast<int32_t>(count), std::make_integer_sequence<int, kFloats>{});
}

template <int Rows, int Vectors>
EXTROPE_INLINE bool first_row_is_finite(const Sums<Rows, Vectors>& sums) {
  floats zero{};
#pragma GCC unroll 16
  for (int j = 0; j < Vectors; ++j) zero += sums.at[0][j] - sums.at[0][j];
  return total(zero) == 0.0f;
}

// sums += factor * what lies at `more`.
template <int Rows, int Vectors>
EXTROPE_INLINE void add_scaled(Sums<Rows, Vectors>& sums, floats factor, const float* more,
                               int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      sums.at[i][j] += factor * load<floats>(more + i * stride + j * kFloats);
    }
  }
}

template <int Rows>
EXTROPE_INLINE void scale_rows(Sums<Rows, kWideVectors>& sums, const float* factors) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWideVectors; ++j) sums.at[i][j] *= broadcast(factors[i]);
  }
}

// sums = a b for Rows rows of a, `depth` long. What kTerms add up to waits at `partial`.
template <int Rows, int Vectors>
EXTROPE_INLINE void multiply_dims(Sums<Rows, Vectors>& sums, const float* a, int64_t a_stride,
                                  const float* b, int64_t b_stride, int64_t depth, float* partial,
                                  int64_t stride) {
  for (int64_t d = 0;; d += kTerms) {
    const int64_t left = depth - d;
    sums = {};
    multiply_add(sums, a + d, a_stride, 1, b + d * b_stride, b_stride,
                 left < kTerms ? left : kTerms);
    if (d > 0) add_scaled(sums, broadcast(1.0f), partial, stride);
    if (left <= kTerms) return;
    store_sums(sums, partial, stride);
  }
}

}  // namespace
}  // namespace extrope
