// Where the rows of a call lie, in which order they are visited, and how far ahead they are
// prefetched.
#pragma once

#include <algorithm>

#include "common/rope_params.h"
#include "cpu/runtime/caches.h"
#include "cpu/runtime/token.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

constexpr int64_t kBytesReadAhead = 2048, kBytesWrittenAhead = 1024;

// Elements from a row to one that comes about `rows` rows later.
inline int64_t distance(int64_t seq, int64_t head, int64_t heads, int64_t rows) {
  heads = std::max<int64_t>(heads, 1);
  const bool apart = head < seq && seq != heads * head;  // other rows lie between two tokens
  return apart ? (rows + heads - 1) / heads * seq : rows * std::min(head, seq);
}

// How many elements ahead of the row at work the rows of a tensor are prefetched.
struct PrefetchDistances {
  int64_t in, out, saved;
  int64_t bytes;      // of a row
  int64_t rows_read;  // as many rows as `in` stands for

  PrefetchDistances(const RopeParams& p, const RopeTensor& x, int64_t element)
      : bytes(p.head_dim * element), rows_read(std::max<int64_t>(kBytesReadAhead / bytes, 1)) {
    const int64_t rows_written = std::max<int64_t>(kBytesWrittenAhead / bytes, 1);
    in = distance(x.in_seq, x.in_head, x.heads, rows_read);
    saved = distance(x.saved_seq, x.saved_head, x.heads, rows_read);
    // Slots of a cache follow each other, but for the last of a page.
    out = x.out_rows ? rows_written * x.out_head
                     : distance(x.out_seq, x.out_head, x.heads, rows_written);
  }

  // `in`, where the next `rows` rows have been read already.
  int64_t in_behind(const RopeTensor& x, int64_t rows) const {
    return distance(x.in_seq, x.in_head, x.heads, rows + rows_read);
  }
};

// Prefetches the cache lines of a row to come: left to itself the processor looks no further than a
// page, and for lines that are only written not at all.
template <typename T>
inline void prefetch(const T* row, int64_t ahead, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const char* first = reinterpret_cast<const char*>(row + ahead);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(first + i);
}

template <typename T>
EXTROPE_INLINE const T* input_row(const RopeTensor& x, const Token<double>& token, int64_t head) {
  return static_cast<const T*>(x.in) + token.batch * x.in_batch + token.seq * x.in_seq +
         head * x.in_head;
}

// nullptr: nowhere.
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

// Whether a vector of results is a whole line of the caches.
template <typename T>
constexpr bool kCanStream = kFloats == 16 && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);

// Whether the rows of a result are written by streaming stores: few would be in a cache when they
// are read, and whole lines need not be read before they are written.
template <typename T>
bool streams_output(const RopeParams& p, const RopeTensor& x) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t heads = p.tensors[0].heads + p.tensors[1].heads;
  return kCanStream<T> && x.out != x.in && !x.out_rows &&
         reinterpret_cast<uintptr_t>(x.out) % 64 == 0 &&
         (x.out_batch | x.out_seq | x.out_head) % kLine == 0 &&
         p.batch * p.seqlen * heads * p.head_dim * int64_t{sizeof(T)} > kMostCached;
}

template <typename T>
bool streams_any_output(const RopeParams& p) {
  return streams_output<T>(p, p.tensors[0]) || streams_output<T>(p, p.tensors[1]);
}

// Rows of some tokens of a block and some heads, in the order in which they lie in memory.
struct Run {
  int64_t tokens, first_head, heads;
  bool of_heads;  // all heads of a token, then of the next; otherwise all tokens of a head

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

// The rows of a run, one after another.
struct Cursor {
  const Run& run;
  int64_t token, head;

  explicit Cursor(const Run& rows) : run(rows), token(0), head(rows.first_head) {}
  EXTROPE_INLINE void next() { skip_of_token(1); }

  // How many rows of the same token come one after another, from this one on.
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

// The inputs of a run's rows, one after another: an address is found once for a token's rows.
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
