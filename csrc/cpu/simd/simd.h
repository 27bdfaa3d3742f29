// Vectors of the instruction set that this translation unit is compiled for, and lane types on
// them.
//
// GCC's vector extensions spell the arithmetic; only fp16 conversions need intrinsics. Everything
// is static so that the linker can never merge code of two instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// The name of a kernel: EXTROPE_EXPAND(rope_, EXTROPE_ISA).
#define EXTROPE_JOIN(a, b) a##b
#define EXTROPE_EXPAND(a, b) EXTROPE_JOIN(a, b)

#define EXTROPE_INLINE inline __attribute__((always_inline))

namespace extrope {
namespace {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
#elif defined(__AVX2__)
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif
constexpr int kDoubles = kFloats / 2;

typedef float floats __attribute__((vector_size(kFloats * 4)));
typedef int32_t ints __attribute__((vector_size(kFloats * 4)));
typedef uint32_t words __attribute__((vector_size(kFloats * 4)));
typedef uint16_t halves __attribute__((vector_size(kFloats * 2)));
typedef double doubles __attribute__((vector_size(kDoubles * 8)));
typedef int64_t longs __attribute__((vector_size(kDoubles * 8)));
// As many lanes as a vector of doubles has: the angles are reduced in double, their sines taken in
// float.
typedef float few_floats __attribute__((vector_size(kDoubles * 4)));
typedef int32_t few_ints __attribute__((vector_size(kDoubles * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ----------------------------------------------------------------------------------------------
// One value

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  return bits_as<__fp16>(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2**112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
  const float scaled = bits_as<float>(magnitude << 13) * 0x1p112f;
  return bits_as<float>(sign | bits_as<uint32_t>(scaled));
#endif
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }

inline void narrow(float x, bf16& out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float x, f16& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  out.bits = bits_as<uint16_t>(static_cast<__fp16>(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000,
                 magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds past 65504
    out.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: let one addition round at 2**-24
    out.bits = uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    out.bits = uint16_t(sign | (rounded - 0x38000000) >> 13);
  }
#endif
}

// ----------------------------------------------------------------------------------------------
// A vector of values

inline floats load_wide(const float* from) { return load<floats>(from); }
inline doubles load_wide(const double* from) { return load<doubles>(from); }

inline floats load_wide(const bf16* from) {
  return bits_as<floats>(__builtin_convertvector(load<halves>(from), words) << 16);
}

inline floats load_wide(const f16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load<__m128i>(from));
#elif defined(__aarch64__)
  return bits_as<floats>(vcvt_f32_f16(load<float16x4_t>(from)));
#else
  floats v;
  for (int i = 0; i < kFloats; ++i) v[i] = widen(from[i]);
  return v;
#endif
}

inline void store_narrow(float* to, floats v) { store(to, v); }
inline void store_narrow(double* to, doubles v) { store(to, v); }

// As store_narrow, past the caches where a vector is a whole line of theirs: before another thread
// may look, order_stores().
template <typename T>
inline void store_past_caches(T* to, floats v) {
  store_narrow(to, v);
}
#if defined(__AVX512F__)
inline void store_past_caches(float* to, floats v) { _mm512_stream_ps(to, v); }
inline void order_stores() { _mm_sfence(); }
#else
inline void order_stores() {}
#endif

// The bits of v rounded to bf16, in the high halves; what is in the low halves is left over. Of a
// plain v NaNs have nothing in their low halves that could be carried into the high ones: they came
// from bf16, or from arithmetic.
template <bool Plain = false>
inline words round_bf16(floats v) {
  const words bits = bits_as<words>(v);
  const words rounded = bits + 0x7fff + (bits >> 16 & 1);
  if constexpr (Plain) return rounded;
  return v != v ? (words{} + 0x7fc00000) : rounded;
}

template <bool Plain = false>
inline void store_narrow(bf16* to, floats v) {
  store(to, __builtin_convertvector(round_bf16<Plain>(v) >> 16, halves));
}

inline void store_narrow(f16* to, floats v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  store(to, vcvt_f16_f32(bits_as<float32x4_t>(v)));
#else
  for (int i = 0; i < kFloats; ++i) narrow(v[i], to[i]);
#endif
}

// ----------------------------------------------------------------------------------------------
// Two vectors of interleaved pairs

template <typename V>
struct Lanes;
template <>
struct Lanes<floats> {
  using Index = ints;
  static constexpr int count = kFloats;
};
template <>
struct Lanes<doubles> {
  using Index = longs;
  static constexpr int count = kDoubles;
};

template <typename V, int... I>
inline std::pair<V, V> unzip(V low, V high, std::integer_sequence<int, I...>) {
  using Index = typename Lanes<V>::Index;
  return {__builtin_shuffle(low, high, Index{2 * I...}),
          __builtin_shuffle(low, high, Index{2 * I + 1 ...})};
}

template <typename V, int... I>
inline std::pair<V, V> zip(V a, V b, std::integer_sequence<int, I...>) {
  using Index = typename Lanes<V>::Index;
  constexpr int n = Lanes<V>::count;
  return {__builtin_shuffle(a, b, Index{(I / 2 + I % 2 * n)...}),
          __builtin_shuffle(a, b, Index{(n / 2 + I / 2 + I % 2 * n)...})};
}

template <typename T>
inline auto load_pairs(const T* from) {
  const auto low = load_wide(from);
  using V = std::remove_const_t<decltype(low)>;
  constexpr int n = Lanes<V>::count;
  return unzip(low, load_wide(from + n), std::make_integer_sequence<int, n>{});
}

template <typename T, typename V>
inline void store_pairs(T* to, V a, V b) {
  constexpr int n = Lanes<V>::count;
  const auto [low, high] = zip(a, b, std::make_integer_sequence<int, n>{});
  store_narrow(to, low);
  store_narrow(to + n, high);
}

// A pair of bf16 is one 32-bit word, so no lane has to move.
inline std::pair<floats, floats> load_pairs(const bf16* from) {
  words both = load<words>(from);
#if defined(__AVX512F__)
  asm("" : "+v"(both));  // or it is loaded twice, and loads are what a rotation has most of
#endif
  return {bits_as<floats>(both << 16), bits_as<floats>(both & 0xffff0000)};
}

#if defined(__AVX512BW__)
// Plain values rounded to bf16, those of a in the low halves. In lanes of 16 bits: the high halves
// of both are one vector, the low halves another, which says of each whether it is rounded up: past
// the middle, or in the middle of two where the first is odd.
inline words round_plain_pairs(floats a, floats b) {
  const words x = bits_as<words>(a), y = bits_as<words>(b);
  const words high = x >> 16 | (y & 0xffff0000), low = (x & 0xffff) | y << 16;
  const __m512i kept = bits_as<__m512i>(high), rest = bits_as<__m512i>(low | (high & 0x00010001));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(rest, _mm512_set1_epi16(INT16_MIN));
  return bits_as<words>(_mm512_mask_sub_epi16(kept, up, kept, _mm512_set1_epi16(-1)));
}
#endif

template <bool Plain = false>
inline void store_pairs(bf16* to, floats a, floats b) {
#if defined(__AVX512BW__)
  if constexpr (Plain) return store(to, round_plain_pairs(a, b));
#endif
  store(to, round_bf16<Plain>(a) >> 16 | (round_bf16<Plain>(b) & 0xffff0000));
}

// As store_narrow and store_pairs, of plain values; see round_bf16.
template <typename T, typename V>
inline void store_plain(T* to, V v) {
  if constexpr (std::is_same_v<T, bf16>) {
    store_narrow<true>(to, v);
  } else {
    store_narrow(to, v);
  }
}

template <typename T, typename V>
inline void store_plain_pairs(T* to, V a, V b) {
  if constexpr (std::is_same_v<T, bf16>) {
    store_pairs<true>(to, a, b);
  } else {
    store_pairs(to, a, b);
  }
}

// NaNs of v without a payload, which makes whatever comes of v plain.
template <typename V>
inline V plain(V v) {
  return v == v ? v : V{} + __builtin_nanf("");
}

}  // namespace
}  // namespace extrope
