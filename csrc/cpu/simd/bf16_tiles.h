// Factors of products of bf16 matrices in tiles of 16 rows of 64 bytes, and their packing.
//
// A left factor's tile has 16 rows of 32 values. A right factor's has 16 pairs of rows of 16
// values, with the two values of a pair side by side. Every packed tile is 1 KiB of contiguous
// memory.
#pragma once

#include <immintrin.h>

#include "cpu/simd/e4m3.h"
#include "cpu/simd/transpose.h"

namespace extrope {
namespace {

constexpr int64_t kSide = 16, kDepth = 32;    // per tile: rows, and values of the common dimension
constexpr int64_t kTileValues = 16 * 32;      // bf16
constexpr int64_t kTileSums = kSide * kSide;  // floats
constexpr int64_t kRowBytes = 64;

// Two tiles of the left factor, rows 0-15 and 16-31 of the sums, at a and a + a_next; two of the
// right one, columns 0-15 and 16-31, side by side. Strides in bf16 values.
struct Factors {
  const bf16* a;
  int64_t a_next, a_step;
  const bf16* b;
  int64_t b_step;
  int64_t depth;  // in tiles
  // Work that a product may skip: rows of the left factor after the first `rows`, whose sums are
  // unused, and pairs of the last tiles after the first `last_pairs`, which are zero.
  int64_t rows = 2 * kSide, last_pairs = kSide;
};

// The layout of 32 x 32 sums: offsets of the tile below and the tile beside, and a row's length, in
// floats.
struct SumsAt {
  float* at;
  int64_t below, beside, row;
};

// ----------------------------------------------------------------------------------------------
// Packing

// Loads `count` values, then zeros; reads nothing after the values.
EXTROPE_INLINE words load_values(const bf16* from, int64_t count) {
  const __mmask32 there = count >= kDepth ? ~0u : (1u << count) - 1;
  return bits_as<words>(_mm512_maskz_loadu_epi16(there, from));
}

// Loads e4m3 as bf16, which can represent all its numbers.
EXTROPE_INLINE words load_values(const e4m3* from, int64_t count) {
  const __mmask32 there = count >= kDepth ? ~0u : (1u << count) - 1;
  return bits_as<words>(widen_to_bf16(_mm256_maskz_loadu_epi8(there, from)));
}

// Rounds floats to pairs of bf16, a in the low halves.
EXTROPE_INLINE words pair_values(floats a, floats b) {
  const words both = bits_as<words>(_mm512_cvtne2ps_pbh(bits_as<__m512>(b), bits_as<__m512>(a)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bits_as<words>(_mm512_permutexvar_epi16(order, bits_as<__m512i>(both)));
}

// 2**x for x up to 127 within 1.5e-7 of its value, exactly 1 at 0; a third faster than exp2_vector.
// Results below the smallest normal float are subnormal.
EXTROPE_INLINE floats exp2_avx512(floats x) {
  constexpr int kFloor = 9;
  const floats f = bits_as<floats>(_mm512_reduce_ps(bits_as<__m512>(x), kFloor));  // in [0, 1)
  floats sum = f * 0x1.e97516p-10f + 0x1.27784ep-7f;
  sum = sum * f + 0x1.c91ce8p-5f;
  sum = sum * f + 0x1.ebdb56p-3f;
  sum = sum * f + 0x1.62e4bap-1f;
  sum = sum * f + 1.0f;
  return bits_as<floats>(_mm512_scalef_ps(bits_as<__m512>(sum), bits_as<__m512>(x)));
}

}  // namespace
}  // namespace extrope
