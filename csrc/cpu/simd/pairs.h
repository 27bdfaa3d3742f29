// Loads and stores two vectors of interleaved pairs.
#pragma once

#include <tuple>

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

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

template <bool Streaming = false, typename T, typename V>
inline void store_pairs(T* to, V a, V b) {
  constexpr int n = Lanes<V>::count;
  const auto [low, high] = zip(a, b, std::make_integer_sequence<int, n>{});
  store_plain<Streaming>(to, low);
  store_plain<Streaming>(to + n, high);
}

// A pair of bf16 is one 32-bit word, so no lane has to move.
inline std::pair<floats, floats> load_pairs(const bf16* from) {
  const words both = in_register(load<words>(from));
  return {bits_as<floats>(both << 16), bits_as<floats>(both & 0xffff0000)};
}

// Reorders numbers that belong to consecutive 16-bit values as load_pairs orders those: the even
// ones of two vectors, then the odd ones. A rest below two vectors stays.
template <typename Number>
void order_by_words(Number* row, int64_t count) {
  using V = std::conditional_t<sizeof(Number) == sizeof(double), doubles, floats>;
  constexpr int kLanes = Lanes<V>::count, kVectors = kFloats / kLanes;
  for (int64_t first = 0; first + 2 * kFloats <= count; first += 2 * kFloats, row += 2 * kFloats) {
    V even[kVectors], odd[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const V low = load<V>(row + 2 * i * kLanes), high = load<V>(row + (2 * i + 1) * kLanes);
      std::tie(even[i], odd[i]) = unzip(low, high, std::make_integer_sequence<int, kLanes>{});
    }
    for (int i = 0; i < kVectors; ++i) {
      store(row + i * kLanes, even[i]);
      store(row + kFloats + i * kLanes, odd[i]);
    }
  }
}

// Restores the order of dims.
inline void order_by_dims(float* row, int64_t count) {
  for (int64_t first = 0; first + 2 * kFloats <= count; first += 2 * kFloats, row += 2 * kFloats) {
    store_pairs(row, load<floats>(row), load<floats>(row + kFloats));
  }
}

#if defined(__AVX512BW__)
// Rounds plain values to bf16, a in the low halves. It works in lanes of 16 bits. The high halves
// of both are one vector, the low halves another, which decides on rounding up: above the middle,
// or in the middle after an odd value.
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

// Stores pairs of plain values (see round_bf16). Streaming: bypasses the caches.
template <bool Streaming = false, typename T, typename V>
inline void store_plain_pairs(T* to, V a, V b) {
  if constexpr (!std::is_same_v<T, bf16>) {
    store_pairs<Streaming>(to, a, b);
#if defined(__AVX512BW__)
  } else if constexpr (Streaming) {
    stream_line(to, round_plain_pairs(a, b));
#endif
  } else {
    store_pairs<true>(to, a, b);
  }
}

}  // namespace
}  // namespace extrope
