// Vectors and lane types of the instruction set for which this translation unit is compiled.
//
// The arithmetic uses GCC's vector extensions; only fp16 conversions need intrinsics. Everything is
// static, so that the linker can never merge code of two instruction sets.
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

// Returns v in a register. GCC would load it again for every use, and a rotation consists mostly of
// loads; and it would make one fma of a product v and a later sum.
template <typename V>
inline V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
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

// GCC 12 converts vectors of integers piece by piece; processors have one instruction.
inline words widen_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return bits_as<words>(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#elif defined(__AVX2__)
  return bits_as<words>(_mm256_cvtepu16_epi32(load<__m128i>(from)));
#else
  return __builtin_convertvector(load<halves>(from), words);
#endif
}

// Stores words below 2**16 as 16 bits each.
inline void store_halves(uint16_t* to, words v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi16(bits_as<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i x = bits_as<__m256i>(v), packed = _mm256_packus_epi32(x, x);
  store(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
  store(to, __builtin_convertvector(v, halves));
#endif
}

inline floats load_wide(const bf16* from) {
  return bits_as<floats>(widen_halves(&from->bits) << 16);
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

template <int Count, typename T>
inline void load_wide(const T* from, floats (&x)[Count]) {
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) x[i] = load_wide(from + i * kFloats);
}

inline void store_narrow(float* to, floats v) { store(to, v); }
inline void store_narrow(double* to, doubles v) { store(to, v); }

// Stores like store_narrow, but bypasses the caches if a vector is a whole cache line
// (non-temporal). Call fence_streaming_stores() before another thread may read.
template <typename T>
inline void store_streaming(T* to, floats v) {
  store_narrow(to, v);
}
#if defined(__AVX512F__)
template <typename V>
inline void stream_line(void* to, const V& line) {
  _mm512_stream_si512(static_cast<__m512i*>(to), bits_as<__m512i>(line));
}
inline void store_streaming(float* to, floats v) { stream_line(to, v); }
inline void fence_streaming_stores() { _mm_sfence(); }
#else
inline void fence_streaming_stores() {}
#endif

// Returns the bits of v rounded to bf16 in the high halves; the low halves are undefined. A v is
// plain if its NaNs, from bf16 or from arithmetic, have low halves that cannot carry into the high
// ones.
template <bool Plain = false>
inline words round_bf16(floats v) {
  const words bits = bits_as<words>(v);
  const words rounded = bits + 0x7fff + (bits >> 16 & 1);
  if constexpr (Plain) return rounded;
  return v != v ? (words{} + 0x7fc00000) : rounded;
}

template <bool Plain = false>
inline void store_narrow(bf16* to, floats v) {
  store_halves(&to->bits, round_bf16<Plain>(v) >> 16);
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

// Stores plain values (see round_bf16) like store_narrow. Streaming: bypasses the caches.
template <bool Streaming = false, typename T, typename V>
inline void store_plain(T* to, V v) {
  if constexpr (std::is_same_v<T, bf16>) {
    store_narrow<true>(to, v);
  } else if constexpr (Streaming) {
    store_streaming(to, v);
  } else {
    store_narrow(to, v);
  }
}

// Converts two vectors of doubles to one of floats.
inline floats narrow(doubles low, doubles high) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
#else
  typedef float half __attribute__((vector_size(sizeof(floats) / 2)));
  const half both[] = {__builtin_convertvector(low, half), __builtin_convertvector(high, half)};
  return load<floats>(both);
#endif
}

template <int... I>
inline ints even_lanes(ints low, ints high, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(low, high, ints{2 * I...});
}

// Returns the low halves of the lanes.
inline ints low_halves(longs low, longs high) {
  return even_lanes(bits_as<ints>(low), bits_as<ints>(high),
                    std::make_integer_sequence<int, kFloats>{});
}

// Removes the payload of NaNs in v, so that all results of v are plain.
template <typename V>
inline V clear_nan_payloads(V v) {
  return v == v ? v : V{} + __builtin_nanf("");
}

}  // namespace
}  // namespace extrope
