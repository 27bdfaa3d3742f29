// float8_e4m3fn has a sign, 4 bits of exponent with bias 7, and 3 of mantissa. There is no
// infinity; NaN has all bits except the sign set. Reads are exact; writes round to nearest even,
// and clamp to its range.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

struct e4m3 {
  uint8_t bits;
};

constexpr float kLargestE4m3 = 448.0f, kLeastNormalE4m3 = 0x1p-6f, kStepE4m3 = 0x1p-9f;

#if defined(__F16C__)
typedef int16_t shorts __attribute__((vector_size(kFloats * 2)));

// Loads codes; the sign fills all bits from 7 up.
inline shorts load_codes(const e4m3* from) {
#if defined(__AVX512F__)
  return bits_as<shorts>(_mm256_cvtepi8_epi16(load<__m128i>(from)));
#else
  return bits_as<shorts>(
      _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#endif
}

// Converts codes to float16, divided by 2**8. Bit 14, the first of the exponent, holds the sign and
// is cleared. In a NaN's code, all bits except the sign set, adding 0x80 carries into bit 14, which
// makes a NaN.
template <typename V>
inline V halves_of(V codes) {
  const V shifted = codes << 7;
  return shifted ^ ((shifted + 0x80) & 0x4000);
}

// Loads numbers divided by kUnitE4m3; the caller applies that factor once to many. They go through
// float16, which has the same bits except for the exponent's bias. Conversions from float16 are
// fast for subnormal numbers too.
constexpr float kUnitE4m3 = 0x1p8f;

inline floats load_units(const e4m3* from) {
  const shorts half = halves_of(load_codes(from));
  return load_wide(reinterpret_cast<const f16*>(&half));
}

template <int Count>
inline void load_units(const e4m3* from, floats (&x)[Count]) {
  int i = 0;
#if defined(__AVX512BW__)
  typedef int16_t all_shorts __attribute__((vector_size(64)));
  // Two vectors share all instructions before the conversions to float.
  for (; i + 1 < Count; i += 2) {
    const __m512i codes = _mm512_cvtepi8_epi16(load<__m256i>(from + i * kFloats));
    const auto half = bits_as<__m512i>(halves_of(bits_as<all_shorts>(codes)));
    x[i] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    x[i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
  }
#endif
  for (; i < Count; ++i) x[i] = load_units(from + i * kFloats);
}

inline floats load_wide(const e4m3* from) { return load_units(from) * kUnitE4m3; }
#else
typedef uint8_t quarters __attribute__((vector_size(kFloats)));

// Subnormal numbers are counted in steps: processors are slow with subnormal floats.
inline floats load_wide(const e4m3* from) {
  const words codes = __builtin_convertvector(load<quarters>(from), words);
  const words sign = (codes & 0x80) << 24, magnitude = codes & 0x7f;
  const words normal = (magnitude << 20) + (120u << 23);
  const floats steps = __builtin_convertvector(bits_as<ints>(magnitude), floats) * kStepE4m3;
  words bits = magnitude < 8 ? bits_as<words>(steps) : normal;
  bits = magnitude == 0x7f ? (words{} + 0x7fc00000) : bits;
  return bits_as<floats>(bits | sign);
}

constexpr float kUnitE4m3 = 1.0f;

template <int Count>
inline void load_units(const e4m3* from, floats (&x)[Count]) {
  load_wide(from, x);
}
#endif

inline float widen(e4m3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, magnitude = x.bits & 0x7f;
  if (magnitude == 0x7f) return bits_as<float>(sign | 0x7fc00000);
  const float size = magnitude < 8 ? static_cast<float>(magnitude) * kStepE4m3
                                   : bits_as<float>((magnitude << 20) + (120u << 23));
  return bits_as<float>(bits_as<uint32_t>(size) | sign);
}

// Stores words below 2**8 as bytes.
inline void store_bytes(uint8_t* to, words v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi8(bits_as<__m512i>(v)));
#else
  uint16_t few[kFloats];
  store_halves(few, v);
#if defined(__AVX2__)
  const __m128i x = load<__m128i>(few);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(x, x));
#else
  for (int i = 0; i < kFloats; ++i) to[i] = static_cast<uint8_t>(few[i]);
#endif
#endif
}

inline void store_narrow(e4m3* to, floats v) {
  const words bits = bits_as<words>(v), sign = bits >> 24 & 0x80;
  const floats size = bits_as<floats>(bits & 0x7fffffff);
  const floats inside = size < kLargestE4m3 ? size : (floats{} + kLargestE4m3);
  const words of = bits_as<words>(inside);
  const words normal = ((of + 0x7ffff + (of >> 20 & 1)) >> 20) - (120u << 3);
  // Adding it rounds to a multiple of the step, the last place of the sum.
  constexpr float kRounder = 0x1p14f;
  const words few = bits_as<words>(inside + kRounder) - (words{} + bits_as<uint32_t>(kRounder));
  words code = inside < kLeastNormalE4m3 ? few : normal;
  code = v == v ? code : (words{} + 0x7f);
  store_bytes(&to->bits, code | sign);
}

inline void narrow(float x, e4m3& out) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 24 & 0x80;
  const float size = bits_as<float>(bits & 0x7fffffff);
  if (x != x) {
    out.bits = uint8_t(sign | 0x7f);
  } else if (size < kLeastNormalE4m3) {
    out.bits = uint8_t(sign | (bits_as<uint32_t>(size + 0x1p14f) - bits_as<uint32_t>(0x1p14f)));
  } else {
    const uint32_t of = bits_as<uint32_t>(size < kLargestE4m3 ? size : kLargestE4m3);
    out.bits = uint8_t(sign | (((of + 0x7ffff + (of >> 20 & 1)) >> 20) - (120u << 3)));
  }
}

#if defined(__AVX512BW__)
// Converts 32 numbers to bf16, which can represent all of them.
inline __m512i widen_to_bf16(__m256i codes) {
  const __m512i wide = _mm512_cvtepi8_epi16(codes);  // the sign fills all bits from 7 up
  const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_and_si512(wide, _mm512_set1_epi16(int16_t(0x8000)));
  __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  const __m512i few = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));  // n steps
  const __mmask32 small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
  bits = _mm512_mask_permutexvar_epi16(bits, small, magnitude, few);
  const __mmask32 none = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  bits = _mm512_mask_mov_epi16(bits, none, _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(bits, sign);
}
#endif

}  // namespace
}  // namespace extrope
