// Products of bf16 tiles by AVX512_BF16, which adds up products of pairs: a row of a right tile is
// a vector of pairs, and a pair of a left tile is broadcast.
#pragma once

#include "cpu/simd/bf16_tiles.h"
#include "cpu/simd/gemm.h"

namespace extrope {
namespace {

// Needs no setup here, unlike with AMX.
struct ProductUnit {
  ProductUnit() {}
};

// True if Factors::rows and last_pairs save work.
constexpr bool kSkipsUnusedRows = true;

// Rows of sums in registers; sixteen vectors of sums cover the latency of an addition.
constexpr int kSumRows = 8;
using FewSums = Sums<kSumRows, 2>;

EXTROPE_INLINE void multiply_tile(FewSums& sums, const bf16* a, const bf16* b, int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512bh left = load<__m512bh>(b + pair * kDepth),
                   right = load<__m512bh>(b + kTileValues + pair * kDepth);
#pragma GCC unroll 16
    for (int i = 0; i < kSumRows; ++i) {
      const __m512bh both =
          bits_as<__m512bh>(_mm512_set1_epi32(load<int32_t>(a + i * kDepth + 2 * pair)));
      floats(&row)[2] = sums.at[i];
      row[0] = bits_as<floats>(_mm512_dpbf16_ps(bits_as<__m512>(row[0]), both, left));
      row[1] = bits_as<floats>(_mm512_dpbf16_ps(bits_as<__m512>(row[1]), both, right));
    }
  }
}

template <bool Add>
EXTROPE_INLINE void multiply_tiles(const Factors& f, const SumsAt& to) {
  for (int part = 0; part * kSumRows < f.rows; ++part) {
    const int64_t below = part / 2, first = part % 2 * kSumRows;
    const bf16* a = f.a + below * f.a_next + first * kDepth;
    float* rows = to.at + below * to.below + first * to.row;
    FewSums sums{};
#pragma GCC unroll 16
    for (int i = 0; Add && i < kSumRows; ++i) {
      sums.at[i][0] = load<floats>(rows + i * to.row);
      sums.at[i][1] = load<floats>(rows + i * to.row + to.beside);
    }
    for (int64_t k = 0; k < f.depth; ++k) {
      const int64_t pairs = k + 1 < f.depth ? kSide : f.last_pairs;
      multiply_tile(sums, a + k * f.a_step, f.b + k * f.b_step, pairs);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSumRows; ++i) {
      store(rows + i * to.row, sums.at[i][0]);
      store(rows + i * to.row + to.beside, sums.at[i][1]);
    }
  }
}

inline void product_of_tiles(const Factors& f, const SumsAt& to) { multiply_tiles<false>(f, to); }

inline void add_product_of_tiles(const Factors& f, const SumsAt& to) {
  multiply_tiles<true>(f, to);
}

}  // namespace
}  // namespace extrope
