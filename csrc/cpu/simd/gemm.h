// Matrix products in registers: a small block of sums stays in vector registers over the whole
// depth of the product.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

// Sums in registers for products with narrow columns: kTallRows x kWideVectors vectors.
#if defined(__AVX512BF16__)
constexpr int kTallRows = 32;  // in tiles of 16 x 16 sums
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTallRows = 12;  // of 32 registers
#else
constexpr int kTallRows = 6;  // of 16 registers
#endif
constexpr int kWideVectors = 2;
constexpr int kWide = kWideVectors * kFloats;

template <int Rows, int Vectors>
struct Sums {
  floats at[Rows][Vectors];
};

// Subtracting zero changes no value, so compilers drop it; adding zero would change -0.
inline floats broadcast(float x) { return x - floats{}; }

// sums[i][j] += sum over k of a[i * row_step + k * depth_step] * b[k * b_step + j].
template <int Rows, int Vectors>
EXTROPE_INLINE void multiply_add(Sums<Rows, Vectors>& sums, const float* a, int64_t row_step,
                                 int64_t depth_step, const float* b, int64_t b_step,
                                 int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    floats row[Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) row[j] = load<floats>(b + j * kFloats);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const floats factor = broadcast(a[i * row_step]);
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sums.at[i][j] += factor * row[j];
    }
    a += depth_step;
    b += b_step;
  }
}

template <int Rows, int Vectors>
EXTROPE_INLINE void load_sums(Sums<Rows, Vectors>& sums, const float* from, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      sums.at[i][j] = load<floats>(from + i * step + j * kFloats);
    }
  }
}

// sums += the sums at `from`.
template <int Rows, int Vectors>
EXTROPE_INLINE void add_sums(Sums<Rows, Vectors>& sums, const float* from, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      sums.at[i][j] += load<floats>(from + i * step + j * kFloats);
    }
  }
}

template <int Rows, int Vectors>
EXTROPE_INLINE void store_sums(const Sums<Rows, Vectors>& sums, float* to, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) store(to + i * step + j * kFloats, sums.at[i][j]);
  }
}

}  // namespace
}  // namespace extrope
