// The permutation on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// Each thread keeps, for every permutation, the lanes that the last token took. The next token's
// are theirs with one more step: a gather like that of the data, by the same function. Only where
// positions jump are they made anew from the cycles.

#include <algorithm>
#include <numeric>

#include "permute.h"
#include "scratch.h"
#include "simd.h"
#include "token.h"

#define EXTROPE_JOIN(a, b) a##b
#define EXTROPE_EXPAND(a, b) EXTROPE_JOIN(a, b)

namespace extrope {
namespace {

constexpr int64_t kBlock = 16;  // tokens

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

// A row that fits in Vectors registers: one instruction picks from two of them, and the lane's
// upper bits say which two. May run in place of `lanes`.
template <typename Word, int Vectors>
void gather_registers(const Word* in, const Word* lanes, Word* out, int64_t dim) {
  constexpr int64_t n = kLanes<Word>;
  Vector<Word> row[Vectors];
  for (int v = 0; v < Vectors; ++v) row[v] = load_first(in + v * n, dim - v * n);
  for (int64_t c = 0; c < dim; c += n) {
    const Vector<Word> lane = load_first(lanes + c, dim - c), pair = lane / Word(2 * n);
    Vector<Word> picked = __builtin_shuffle(row[0], row[Vectors > 1], lane);
    for (int v = 2; v < Vectors; v += 2) {
      picked = pair == Word(v / 2) ? __builtin_shuffle(row[v], row[v + 1], lane) : picked;
    }
    store_first(out + c, picked, dim - c);
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

// The lanes that each permutation takes at one position.
template <typename Word>
class StepLanes {
 public:
  StepLanes(const PermuteParams& p, const PermuteCycles& cycles, Gather<Word> gather)
      : dim_(p.head_dim), cycles_(cycles), gather_(gather) {
    step_.assign(cycles.step, cycles.step + p.rows * dim_);
    lanes_.resize(p.rows * dim_);
    position_.assign(p.rows, 0);
    for (int64_t row = 0; row < p.rows; ++row) {
      std::iota(&lanes_[row * dim_], &lanes_[row * dim_] + dim_, Word{0});
    }
  }

  const Word* at(int64_t row, uint64_t position) {
    Word* lanes = &lanes_[row * dim_];
    // 2^63 - 1 and -2^63 are neighbours in uint64_t alone.
    if (position == position_[row] + 1 && position != uint64_t{1} << 63) {
      gather_(&step_[row * dim_], lanes, lanes, dim_);
    } else if (position != position_[row]) {
      jump(row, static_cast<int64_t>(position), lanes);
    }
    position_[row] = position;
    return lanes;
  }

 private:
  void jump(int64_t row, int64_t position, Word* lanes) const {
    const int32_t *flat = cycles_.flat + row * dim_, *end = cycles_.end + row * dim_;
    for (int64_t begin = 0; begin < dim_; begin = end[begin]) {
      const int64_t length = end[begin] - begin;
      int64_t from = position % length;
      if (from < 0) from += length;
      for (int64_t i = 0; i < length; ++i) {
        lanes[flat[begin + i]] = static_cast<Word>(flat[begin + from]);
        if (++from == length) from = 0;
      }
    }
  }

  int64_t dim_;
  PermuteCycles cycles_;
  Gather<Word> gather_;
  Buffer<Word> step_, lanes_;
  Buffer<uint64_t> position_;
};

template <typename Word>
void permute_words(const PermuteParams& p, const PermuteCycles& cycles, int64_t begin,
                   int64_t end) {
  const Gather<Word> gather = choose_gather<Word>(p.head_dim);
  StepLanes<Word> lanes(p, cycles, gather);
  // The heads that share row `row` at one token: q's, then k's.
  const auto permute_row = [&](const Token<uint64_t>& token, int64_t row) {
    const Word* from = lanes.at(row, token.position);
    for (int64_t n = 0; n < p.num_tensors; ++n) {
      const PermuteTensor& x = p.tensors[n];
      const int64_t group = x.heads / p.rows, first = row * group;
      const Word* in = static_cast<const Word*>(x.in) + token.batch * x.in_batch +
                       token.seq * x.in_seq + first * x.in_head;
      Word* out = static_cast<Word*>(x.out) + token.batch * x.out_batch + token.seq * x.out_seq +
                  first * x.out_head;
      for (int64_t head = 0; head < group; ++head) {
        gather(in + head * x.in_head, from, out + head * x.out_head, p.head_dim);
      }
    }
  };
  Token<uint64_t> tokens[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t t = 0; t < count; ++t) {
      tokens[t] = locate<uint64_t>(p, (first + t) / p.seqlen, (first + t) % p.seqlen);
    }
    // Whichever walks memory forward.
    if (p.tensors[0].in_head < p.tensors[0].in_seq) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t row = 0; row < p.rows; ++row) permute_row(tokens[t], row);
      }
    } else {
      for (int64_t row = 0; row < p.rows; ++row) {
        for (int64_t t = 0; t < count; ++t) permute_row(tokens[t], row);
      }
    }
  }
}

}  // namespace

void EXTROPE_EXPAND(permute_tokens_, EXTROPE_ISA)(const PermuteParams& p,
                                                  const PermuteCycles& cycles, int64_t begin,
                                                  int64_t end) {
  switch (p.element_size) {
    case 2:
      return permute_words<uint16_t>(p, cycles, begin, end);
    case 4:
      return permute_words<uint32_t>(p, cycles, begin, end);
    default:
      return permute_words<uint64_t>(p, cycles, begin, end);
  }
}

}  // namespace extrope
