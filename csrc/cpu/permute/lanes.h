// How a row of lanes is permuted, and which lanes a power of a permutation takes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/permute/kernel.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

template <typename Word>
using Gather = void (*)(const Word* in, const Word* lanes, Word* out, int64_t dim);

template <typename Word>
void gather_scalar(const Word* in, const Word* lanes, Word* out, int64_t dim) {
  for (int64_t c = 0; c < dim; ++c) out[c] = in[lanes[c]];
}

#if defined(__AVX512F__)

template <typename Word>
struct VectorOf {
  typedef Word type __attribute__((vector_size(64)));
};
template <typename Word>
using Vector = typename VectorOf<Word>::type;
template <typename Word>
constexpr int64_t kLanes = 64 / sizeof(Word);

inline uint64_t first_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << std::max<int64_t>(count, 0)) - 1;
}

// The first `count` lanes; nothing behind them is touched.
template <typename Word>
inline Vector<Word> load_first(const Word* from, int64_t count) {
  const uint64_t mask = first_bits(count);
  if constexpr (sizeof(Word) == 2)
    return bits_as<Vector<Word>>(_mm512_maskz_loadu_epi16(mask, from));
  if constexpr (sizeof(Word) == 4)
    return bits_as<Vector<Word>>(_mm512_maskz_loadu_epi32(mask, from));
  if constexpr (sizeof(Word) == 8)
    return bits_as<Vector<Word>>(_mm512_maskz_loadu_epi64(mask, from));
}

template <typename Word>
inline void store_first(Word* to, Vector<Word> v, int64_t count) {
  const uint64_t mask = first_bits(count);
  if constexpr (sizeof(Word) == 2) _mm512_mask_storeu_epi16(to, mask, bits_as<__m512i>(v));
  if constexpr (sizeof(Word) == 4) _mm512_mask_storeu_epi32(to, mask, bits_as<__m512i>(v));
  if constexpr (sizeof(Word) == 8) _mm512_mask_storeu_epi64(to, mask, bits_as<__m512i>(v));
}

// The lanes `lane` of a row that fits in Vectors registers: one instruction picks from two of them,
// and the lane's upper bits say which two.
template <int Vectors, typename V>
inline V pick(const V (&row)[Vectors], V lane) {
  using Word = std::remove_reference_t<decltype(lane[0])>;
  // A vector each: where the compiler instruments, a scalar has become an int that is too wide.
  const auto all = [](Word x) { return V{} + x; };
  const V pair = lane / all(2 * sizeof(V) / sizeof(Word));
  V picked = __builtin_shuffle(row[0], row[Vectors > 1], lane);
  for (int v = 2; v < Vectors; v += 2) {
    picked = pair == all(v / 2) ? __builtin_shuffle(row[v], row[v + 1], lane) : picked;
  }
  return picked;
}

// May run in place of `lanes`.
template <typename Word, int Vectors>
void gather_registers(const Word* in, const Word* lanes, Word* out, int64_t dim) {
  constexpr int64_t n = kLanes<Word>;
  Vector<Word> row[Vectors];
  for (int v = 0; v < Vectors; ++v) row[v] = load_first(in + v * n, dim - v * n);
  for (int64_t c = 0; c < dim; c += n) {
    store_first(out + c, pick(row, load_first(lanes + c, dim - c)), dim - c);
  }
}

template <typename Word>
Gather<Word> choose_gather(int64_t dim) {
  const int64_t vectors = (dim + kLanes<Word> - 1) / kLanes<Word>;
  if (vectors <= 2) return gather_registers<Word, 2>;
  if (vectors <= 4) return gather_registers<Word, 4>;
  if (vectors <= 8) return gather_registers<Word, 8>;
  return gather_scalar<Word>;
}

#else

template <typename Word>
Gather<Word> choose_gather(int64_t) {
  return gather_scalar<Word>;
}

#endif

// The lanes that the power `position` of permutation `row` takes, from its cycles.
template <typename Word>
void power_lanes(const PermuteCycles& cycles, int64_t row, int64_t dim, int64_t position,
                 Word* lanes) {
  const int32_t *flat = cycles.flat + row * dim, *end = cycles.end + row * dim;
  for (int64_t begin = 0; begin < dim; begin = end[begin]) {
    const int64_t length = end[begin] - begin;
    int64_t from = position % length;
    if (from < 0) from += length;
    for (int64_t i = 0; i < length; ++i) {
      lanes[flat[begin + i]] = static_cast<Word>(flat[begin + from]);
      if (++from == length) from = 0;
    }
  }
}

// Whether a step leads from one position to the other: 2^63 - 1 and -2^63 are neighbours in
// uint64_t alone.
inline bool follows(uint64_t position, uint64_t before) {
  return position == before + 1 && position != uint64_t{1} << 63;
}

}  // namespace
}  // namespace extrope
