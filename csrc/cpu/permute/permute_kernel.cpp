// The permutation on the CPU. Compiled once per instruction set, with EXTROPE_ISA as its name.
//
// Each thread keeps, for every permutation, the dims that the last token took. One more step gives
// the next token's dims: a gather like that of the data, by the same function. Only if positions
// jump, the cycles give them.

#include <algorithm>

#include "cpu/permute/dims.h"
#include "cpu/runtime/buffer.h"
#include "cpu/runtime/token.h"

namespace extrope {
namespace {

constexpr int64_t kBlock = 16;  // tokens

// The dims that a permutation's power takes at the last requested position.
template <typename Word>
struct LastSources {
  LastSources(const PermuteCycles& cycles, int64_t row, int64_t dim)
      : step(dim), sources(dim), powers(cycles, row, dim, step.data()) {}

  const Word* at(uint64_t now) {
    if (!known || now != position) {
      powers.find(now, position, known ? sources.data() : nullptr, sources.data());
    }
    known = true, position = now;
    return sources.data();
  }

  Buffer<Word> step, sources;
  Powers<Word> powers;
  bool known = false;
  uint64_t position = 0;
};

template <typename Word>
void permute_words(const PermuteParams& p, const PermuteCycles& cycles, int64_t begin,
                   int64_t end) {
  const Gather<Word> gather = choose_gather<Word>(p.head_dim);
  Buffer<LastSources<Word>> sources;
  sources.reserve(p.rows);
  for (int64_t row = 0; row < p.rows; ++row) sources.emplace_back(cycles, row, p.head_dim);
  // Permutes the heads that share row `row` at one token: q's, then k's.
  const auto permute_row = [&](const Token<uint64_t>& token, int64_t row) {
    const Word* from = sources[row].at(token.position);
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
    // Choose the order that goes through memory forward.
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
