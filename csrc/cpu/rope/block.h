// Shared by the kernels of the rotation: the places of rows, the order of their visits, the
// distances of prefetches, and the cosines and sines of a block of tokens.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/rope_params.h"
#include "cpu/rope/copied_rows.h"
#include "cpu/rope/pairs.h"
#include "cpu/runtime/buffer.h"
#include "cpu/runtime/caches.h"
#include "cpu/runtime/token.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

constexpr int64_t kBytesReadAhead = 2048, kBytesWrittenAhead = 1024;

// Returns the elements from a row to one about `rows` rows later.
inline int64_t distance(int64_t seq, int64_t head, int64_t heads, int64_t rows) {
  heads = std::max<int64_t>(heads, 1);
  const bool apart = head < seq && seq != heads * head;  // other rows lie between two tokens
  return apart ? (rows + heads - 1) / heads * seq : rows * std::min(head, seq);
}

// The distances of prefetches from the current row, in elements.
struct PrefetchDistances {
  int64_t in, out, saved;
  int64_t bytes;      // per row
  int64_t rows_read;  // the number of rows in `in`

  PrefetchDistances(const RopeParams& p, const RopeTensor& x, int64_t element)
      : bytes(p.head_dim * element), rows_read(std::max<int64_t>(kBytesReadAhead / bytes, 1)) {
    const int64_t rows_written = std::max<int64_t>(kBytesWrittenAhead / bytes, 1);
    in = distance(x.in_seq, x.in_head, x.heads, rows_read);
    saved = distance(x.saved_seq, x.saved_head, x.heads, rows_read);
    // Slots of a cache are contiguous, except after a page's last one.
    out = x.out_rows ? rows_written * x.out_head
                     : distance(x.out_seq, x.out_head, x.heads, rows_written);
  }

  // Returns the distance past `rows` more rows, which have been read already.
  int64_t in_behind(const RopeTensor& x, int64_t rows) const {
    return distance(x.in_seq, x.in_head, x.heads, rows + rows_read);
  }
};

// Prefetches the cache lines of a later row. The processor itself prefetches only within a page,
// and never lines that are only written.
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

// True if a vector of results is a whole cache line.
template <typename T>
constexpr bool kCanStream = kFloats == 16 && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);

// Returns true to write a result by streaming stores: few of its rows would still be cached when
// they are read, and whole lines need no read before a write.
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

constexpr int64_t kBlock = 16;  // tokens

// Cosines and sines of a block of tokens, and the padded frequencies and decays for them. With
// positions by axis (mRoPE) each pair has its own position: then frequencies and decays are
// multiplied by positions first, into `angles` and `exponents`.
template <typename T>
struct AngleScratch {
  AngleScratch(const RopeParams& p, int64_t tokens)
      : half(p.rotary_dim / 2),
        stride((half + kFloats - 1) / kFloats * kFloats),
        in_words(std::is_same_v<T, bf16> && !p.interleaved) {  // rows are read so: see pairs.h
    freq.resize(stride);
    decay.resize(p.log_decay ? stride : 0);
    cos.resize(std::min(kBlock, tokens) * stride);
    sin.resize(std::min(kBlock, tokens) * stride);
    if (p.log_decay) std::copy_n(p.log_decay, half, decay.begin());
    if (p.axes) {
      positions.resize(p.num_axes);
      angles.resize(stride);
      exponents.resize(decay.size());
    } else {
      prepare(decay);
    }
  }

  // Converts a row of values of pairs for fill_sincos: in the order of cos and sin, and NaNs
  // without payloads, so that cos and sin are plain.
  void prepare(Buffer<double>& row) const {
    if (row.empty()) return;
    for (int64_t i = 0; i < stride; i += kDoubles) {
      store(&row[i], plain(load<doubles>(&row[i])));
    }
    if (in_words) order_by_words(row.data(), half);
  }

  int64_t half, stride;
  bool in_words;
  Buffer<double> freq, decay;
  Buffer<double> positions, angles, exponents;  // of one token: by axis, by pair, by pair
  Buffer<Wide<T>> cos, sin;
};

// The form of a tensor's rows: Half pairs, which are all dims; or any number of pairs if Half is 0.
// Streaming: they are written by streaming stores.
template <int64_t Half, bool Streaming>
struct RowForm {
  static constexpr int64_t kHalf = Half;
  static constexpr bool kStreams = Streaming;
};

// Calls visit(RowForm()) for a tensor. Half is set only for the most common rows, and only if
// registers can hold a value per pair.
template <typename T, typename Visit>
auto with_row_form(const RopeParams& p, const RopeTensor& x, const Visit& visit) {
  if constexpr (kFloats == 16 && sizeof(T) <= sizeof(float)) {
    const int64_t dims = p.rotary_dim == p.head_dim ? p.head_dim : 0;
    if constexpr (kCanStream<T>) {
      const bool streams = streams_output<T>(p, x);
      if (streams && dims == 64) return visit(RowForm<32, true>());
      if (streams && dims == 128) return visit(RowForm<64, true>());
    }
    if (dims == 64) return visit(RowForm<32, false>());
    if (dims == 128) return visit(RowForm<64, false>());
  }
  return visit(RowForm<0, false>());
}

// Points to the cosines and sines of one token of the block.
template <typename T>
struct TokenCosSin {
  TokenCosSin(const AngleScratch<T>& scratch, int64_t token)
      : cos(scratch.cos.data() + token * scratch.stride),
        sin(scratch.sin.data() + token * scratch.stride) {}
  const Wide<T>*cos, *sin;
};

template <typename T>
void load_freq(const RopeParams& p, int64_t row, AngleScratch<T>& scratch) {
  if (p.inv_freq_is_f64) {
    std::copy_n(static_cast<const double*>(p.inv_freq) + row, scratch.half, scratch.freq.begin());
  } else {
    std::copy_n(static_cast<const float*>(p.inv_freq) + row, scratch.half, scratch.freq.begin());
  }
  if (!p.axes) scratch.prepare(scratch.freq);
}

inline double position_on(const RopeParams& p, const Token<double>& token, int64_t axis) {
  const int64_t index =
      axis * p.position_axis + token.batch * p.position_batch + token.seq * p.position_seq;
  return read_position<double>(p, index) + static_cast<double>(p.offset);
}

// Computes the angles of one token, and the exponents of its decay, by the position on each pair's
// axis.
template <typename T>
void fill_angles_by_axis(const RopeParams& p, const Token<double>& token,
                         AngleScratch<T>& scratch) {
  for (int64_t axis = 0; axis < p.num_axes; ++axis) {
    scratch.positions[axis] = position_on(p, token, axis);
  }
  for (int64_t i = 0; i < scratch.half; ++i) {
    const double position = scratch.positions[p.axes[i]];
    scratch.angles[i] = scratch.freq[i] * position;
    if (p.log_decay) scratch.exponents[i] = scratch.decay[i] * (position - p.decay_origin);
  }
  scratch.prepare(scratch.angles);
  scratch.prepare(scratch.exponents);
}

// Fills cosines and sines of a block for one tensor. Rows that are only copied wait for memory, and
// angles need only arithmetic: so each token's copies go between two tokens' angles, once per
// block.
template <typename T>
void fill_cos_sin_and_copy(const RopeParams& p, const RopeTensor& tensor,
                           const Token<double>* tokens, int64_t count, int64_t head,
                           AngleScratch<T>& scratch) {
  const int num_copied = &tensor == p.tensors && head == 0 ? p.num_copied : 0;
  int64_t loaded = -1;
  for (int64_t t = 0; t < count; ++t) {
    for (int n = 0; n < num_copied; ++n) {
      copy_token(p.copied[n], tokens[t].batch, tokens[t].seq, tokens[t].index);
    }
    const int64_t row = tokens[t].sequence * p.freq_batch + head * p.freq_head;
    if (row != loaded) load_freq(p, row, scratch);
    loaded = row;
    if (p.axes) fill_angles_by_axis(p, tokens[t], scratch);
    // Angles by axis already include the positions.
    const double position = p.axes ? 1.0 : plain(tokens[t].position);
    const auto& freq = p.axes ? scratch.angles : scratch.freq;
    const auto& decay = p.axes ? scratch.exponents : scratch.decay;
    const double from_origin = p.axes ? 1.0 : position - p.decay_origin;
    const Angles angles{.position = position,
                        .amplitude = p.amplitude,
                        .decay = tensor.decay_sign * from_origin,
                        .log_decay = p.log_decay ? decay.data() : nullptr,
                        .conjugate = p.conjugate};
    Wide<T>* cos = scratch.cos.data() + t * scratch.stride;
    Wide<T>* sin = scratch.sin.data() + t * scratch.stride;
    fill_sincos(freq.data(), scratch.half, angles, cos, sin);
  }
}

// Calls visit(Run) for all rows of a block of one tensor, with their cosines and sines in the
// scratch memory. filled: those are there already, unless heads have their own.
template <typename T, typename Visit>
void for_each_run(const RopeParams& p, const RopeTensor& tensor, const Token<double>* tokens,
                  int64_t count, AngleScratch<T>& scratch, bool filled, const Visit& visit) {
  if (p.angle_heads > 1) {
    for (int64_t head = 0; head < tensor.heads; ++head) {
      fill_cos_sin_and_copy<T>(p, tensor, tokens, count, head, scratch);
      visit(Run{count, head, 1, false});
    }
    return;
  }
  if (!filled) fill_cos_sin_and_copy<T>(p, tensor, tokens, count, 0, scratch);
  visit(Run{count, 0, tensor.heads, tensor.in_head < tensor.in_seq});
}

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

}  // namespace
}  // namespace extrope
