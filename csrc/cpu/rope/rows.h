// The places of rows, blocks of tokens, and the order in which a block's rows are visited.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/rope_params.h"
#include "cpu/runtime/token.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

template <typename T>
EXTROPE_INLINE const T* input_row(const RopeTensor& x, const Token<double>& token, int64_t head) {
  return static_cast<const T*>(x.in) + token.batch * x.in_batch + token.seq * x.in_seq +
         head * x.in_head;
}

// Returns nullptr if the row is not written.
template <typename T>
EXTROPE_INLINE T* output_row(const RopeTensor& x, const Token<double>& token, int64_t head) {
  T* out = static_cast<T*>(x.out) + head * x.out_head;
  if (!x.out_rows) return out + token.batch * x.out_batch + token.seq * x.out_seq;
  const int64_t row = x.out_rows[token.index];
  return row < 0 ? nullptr : out + row;
}

template <typename T>
EXTROPE_INLINE const T* saved_row(const RopeTensor& x, const Token<double>& token, int64_t head) {
  return static_cast<const T*>(x.saved) + token.batch * x.saved_batch + token.seq * x.saved_seq +
         head * x.saved_head;
}

// Copies the dims of a row that do not rotate.
template <typename T>
inline void copy_rest(const RopeParams& p, const T* in, T* out) {
  const int64_t end = p.rotary_offset + p.rotary_dim;
  if (p.rotary_offset > 0) std::memcpy(out, in, p.rotary_offset * sizeof(T));
  if (end < p.head_dim) std::memcpy(out + end, in + end, (p.head_dim - end) * sizeof(T));
}

constexpr int64_t kBlock = 16;  // tokens

// Calls block(tokens, count) for the tokens begin..end-1, a few at a time.
template <typename Block>
void for_each_block(const RopeParams& p, int64_t begin, int64_t end, const Block& block) {
  Token<double> tokens[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t t = 0; t < count; ++t) {
      tokens[t] = locate<double>(p, (first + t) / p.seqlen, (first + t) % p.seqlen);
    }
    block(tokens, count);
  }
}

// Rows of some tokens of a block and some heads, in memory order.
struct Run {
  int64_t tokens, first_head, heads;
  bool of_heads;  // all heads of a token, then of the next; else all tokens of a head

  template <typename Visit>
  void for_each_row(const Visit& visit) const {
    const int64_t last = first_head + heads;
    if (of_heads) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t head = first_head; head < last; ++head) visit(t, head);
      }
    } else {
      for (int64_t head = first_head; head < last; ++head) {
        for (int64_t t = 0; t < tokens; ++t) visit(t, head);
      }
    }
  }
};

// An iterator over the rows of a run.
struct Cursor {
  const Run& run;
  int64_t token, head;

  explicit Cursor(const Run& rows) : run(rows), token(0), head(rows.first_head) {}

  // Returns how many rows of the same token follow, this one included.
  EXTROPE_INLINE int64_t left_of_token() const {
    return run.of_heads ? run.first_head + run.heads - head : 1;
  }

  EXTROPE_INLINE void skip_of_token(int64_t rows) {
    if (!run.of_heads) {
      if (++token == run.tokens) token = 0, ++head;
    } else if ((head += rows) == run.first_head + run.heads) {
      head = run.first_head, ++token;
    }
  }
};

// An iterator over the inputs of a run's rows, which computes one address per token.
template <typename T>
class Inputs {
 public:
  Inputs(const RopeTensor& x, const Token<double>* tokens, const Run& run)
      : x_(x), tokens_(tokens), step_(x.in_head), at_(run) {}

  EXTROPE_INLINE const T* next() {
    if (left_ == 0) {
      row_ = input_row<T>(x_, tokens_[at_.token], at_.head);
      left_ = at_.left_of_token();
      at_.skip_of_token(left_);
    }
    --left_;
    const T* row = row_;
    row_ += step_;
    return row;
  }

 private:
  const RopeTensor& x_;
  const Token<double>* tokens_;
  const int64_t step_;
  Cursor at_;
  const T* row_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace
}  // namespace extrope
