// Permutes the dims of a row, and finds the dims that a power of a permutation takes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/permute/kernel.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

// out[c] = in[sources[c]]; may run in place of `sources`.
template <typename Word>
using Gather = void (*)(const Word* in, const Word* sources, Word* out, int64_t dim);

template <typename Word>
void gather_scalar(const Word* in, const Word* sources, Word* out, int64_t dim) {
  for (int64_t c = 0; c < dim; ++c) out[c] = in[sources[c]];
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

// Loads or stores the first `count` lanes, and touches nothing after them. Whole registers need no
// mask: processors forward no masked store to a load, so an immediate load would wait.
template <bool Whole, typename Word>
inline Vector<Word> load_first(const Word* from, int64_t count) {
  if constexpr (Whole) return load<Vector<Word>>(from);
  const uint64_t mask = first_bits(count);
  if constexpr (sizeof(Word) == 2)
    return bits_as<Vector<Word>>(_mm512_maskz_loadu_epi16(mask, from));
  if constexpr (sizeof(Word) == 4)
    return bits_as<Vector<Word>>(_mm512_maskz_loadu_epi32(mask, from));
  if constexpr (sizeof(Word) == 8)
    return bits_as<Vector<Word>>(_mm512_maskz_loadu_epi64(mask, from));
}

template <bool Whole, typename Word>
inline void store_first(Word* to, Vector<Word> v, int64_t count) {
  if constexpr (Whole) return store(to, v);
  const uint64_t mask = first_bits(count);
  if constexpr (sizeof(Word) == 2) _mm512_mask_storeu_epi16(to, mask, bits_as<__m512i>(v));
  if constexpr (sizeof(Word) == 4) _mm512_mask_storeu_epi32(to, mask, bits_as<__m512i>(v));
  if constexpr (sizeof(Word) == 8) _mm512_mask_storeu_epi64(to, mask, bits_as<__m512i>(v));
}

// Takes the dims `source` of a row that fits in Vectors registers: one instruction picks from two
// registers, and the upper bits of a source select the two.
template <int Vectors, typename V>
inline V pick(const V (&row)[Vectors], V source) {
  using Word = std::remove_reference_t<decltype(source[0])>;
  // A vector each: under the compiler's instrumentation a scalar becomes an int, which is too wide.
  const auto all = [](Word x) { return V{} + x; };
  const V pair = source / all(2 * sizeof(V) / sizeof(Word));
  V picked = __builtin_shuffle(row[0], row[Vectors > 1], source);
  for (int v = 2; v < Vectors; v += 2) {
    picked = pair == all(v / 2) ? __builtin_shuffle(row[v], row[v + 1], source) : picked;
  }
  return picked;
}

template <bool Whole, int Vectors, typename Word>
void gather_registers(const Word* in, const Word* sources, Word* out, int64_t dim) {
  constexpr int64_t n = kLanes<Word>;
  if constexpr (Whole) dim = Vectors * n;
  Vector<Word> row[Vectors];
  for (int v = 0; v < Vectors; ++v) row[v] = load_first<Whole>(in + v * n, dim - v * n);
  for (int64_t c = 0; c < dim; c += n) {
    store_first<Whole>(out + c, pick(row, load_first<Whole>(sources + c, dim - c)), dim - c);
  }
}

template <typename Word>
Gather<Word> choose_gather(int64_t dim) {
  const int64_t left = dim % kLanes<Word>, vectors = dim / kLanes<Word> + (left > 0);
  if (left == 0 && vectors == 2) return gather_registers<true, 2, Word>;
  if (left == 0 && vectors == 4) return gather_registers<true, 4, Word>;
  if (left == 0 && vectors == 8) return gather_registers<true, 8, Word>;
  if (vectors <= 2) return gather_registers<false, 2, Word>;
  if (vectors <= 4) return gather_registers<false, 4, Word>;
  if (vectors <= 8) return gather_registers<false, 8, Word>;
  return gather_scalar<Word>;
}

#else

template <typename Word>
Gather<Word> choose_gather(int64_t) {
  return gather_scalar<Word>;
}

#endif

// The powers of permutation `row`, as the dims that they take.
template <typename Word>
class Powers {
 public:
  // Writes the permutation itself to `step`, as words.
  Powers(const PermuteCycles& cycles, int64_t row, int64_t dim, Word* step)
      : flat_(cycles.flat + row * dim),
        end_(cycles.end + row * dim),
        step_(step),
        dim_(dim),
        gather_(choose_gather<Word>(dim)) {
    std::copy_n(cycles.step + row * dim, dim, step);
  }

  // Finds the dims at `position`: one step from `last`, the dims at position `before`, if given and
  // positions are consecutive; else from the cycles.
  void find(uint64_t position, uint64_t before, const Word* last, Word* sources) const {
    // 2^63 - 1 and -2^63 are neighbours only in uint64_t.
    if (last && position == before + 1 && position != uint64_t{1} << 63) {
      gather_(step_, last, sources, dim_);
    } else {
      from_cycles(static_cast<int64_t>(position), sources);
    }
  }

 private:
  void from_cycles(int64_t position, Word* sources) const {
    for (int64_t begin = 0; begin < dim_; begin = end_[begin]) {
      const int64_t length = end_[begin] - begin;
      int64_t from = position % length;
      if (from < 0) from += length;
      for (int64_t i = 0; i < length; ++i) {
        sources[flat_[begin + i]] = static_cast<Word>(flat_[begin + from]);
        if (++from == length) from = 0;
      }
    }
  }

  const int32_t *flat_, *end_;
  const Word* step_;
  int64_t dim_;
  Gather<Word> gather_;
};

}  // namespace
}  // namespace extrope
