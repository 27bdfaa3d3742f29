// What the kernels of the rotation share: the cosines and sines of a block of tokens.
#pragma once

#include <algorithm>

#include "common/rope_params.h"
#include "cpu/rope/copied_rows.h"
#include "cpu/rope/pairs.h"
#include "cpu/rope/rows.h"
#include "cpu/runtime/buffer.h"
#include "cpu/runtime/token.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

constexpr int64_t kBlock = 16;  // tokens

// Cosines and sines of one block of tokens, and the padded frequencies and decays that they are
// made from. With positions by axis (mRoPE) these are multiplied by the positions first, since each
// pair has its own: `angles` and `exponents`.
template <typename T>
struct Scratch {
  Scratch(const RopeParams& p, int64_t tokens)
      : half(p.rotary_dim / 2),
        stride((half + kFloats - 1) / kFloats * kFloats),
        in_words(std::is_same_v<T, bf16> && !p.interleaved) {
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

  // Brings a row of values of pairs to the form that fill_sincos takes: in the order of cos and
  // sin, and NaNs without payloads, so that cos and sin are plain.
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

// How the rows of one tensor are rotated: Half pairs each, which are all of their dims; or if that
// is 0 any number of pairs. Streaming: they are written by streaming stores.
template <int64_t Half, bool Streaming>
struct RowForm {
  static constexpr int64_t kHalf = Half;
  static constexpr bool kStreams = Streaming;
};

// visit(RowForm()) for a tensor. Half is set for the most common rows alone, and only where
// registers can hold a value for each of their pairs.
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

// Cosines and sines of one token.
template <typename T>
struct CosSin {
  CosSin(const Scratch<T>& scratch, int64_t token)
      : cos(scratch.cos.data() + token * scratch.stride),
        sin(scratch.sin.data() + token * scratch.stride) {}
  const Wide<T>*cos, *sin;
};

template <typename T>
void load_freq(const RopeParams& p, int64_t row, Scratch<T>& scratch) {
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

// The angles of one token, and the exponents of its decay, by the position on each pair's axis.
template <typename T>
void fill_angles_by_axis(const RopeParams& p, const Token<double>& token, Scratch<T>& scratch) {
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

// Cosines or sines that the caller gives, widened, in the order of the block's own.
template <typename From, typename To>
void widen_given(const void* given, int64_t at, const Scratch<To>& scratch, Wide<To> sign,
                 Wide<To>* out) {
  const From* row = static_cast<const From*>(given) + at;
  for (int64_t i = 0; i < scratch.half; ++i) out[i] = sign * static_cast<Wide<To>>(widen(row[i]));
  if (scratch.in_words) order_by_words(out, scratch.half);
}

template <typename From, typename T>
void fill_given_of(const RopeParams& p, const Token<double>* tokens, int64_t count,
                   Scratch<T>& scratch) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t batch = tokens[t].batch, seq = tokens[t].seq, row = t * scratch.stride;
    widen_given<From>(p.cos, batch * p.cos_batch + seq * p.cos_seq, scratch, Wide<T>{1},
                      scratch.cos.data() + row);
    widen_given<From>(p.sin, batch * p.sin_batch + seq * p.sin_seq, scratch,
                      Wide<T>(p.conjugate ? -1 : 1), scratch.sin.data() + row);
  }
}

template <typename T>
void fill_given(const RopeParams& p, const Token<double>* tokens, int64_t count,
                Scratch<T>& scratch) {
  switch (p.cos_sin_dtype) {
    case DType::f32:
      return fill_given_of<float>(p, tokens, count, scratch);
    case DType::f64:
      return fill_given_of<double>(p, tokens, count, scratch);
    case DType::bf16:
      return fill_given_of<bf16>(p, tokens, count, scratch);
    case DType::f16:
      return fill_given_of<f16>(p, tokens, count, scratch);
  }
}

// Cosines and sines of a block for one tensor. Rows that are only copied wait for memory while
// angles are computed, so each token's copies go between two tokens' angles, once a block.
template <typename T>
void fill_block(const RopeParams& p, const RopeTensor& tensor, const Token<double>* tokens,
                int64_t count, int64_t head, Scratch<T>& scratch) {
  if (p.cos) return fill_given(p, tokens, count, scratch);
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
    // Angles by axis are multiplied by their positions already.
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

// Calls visit(Run) for all rows of a block of one tensor, whose cosines and sines are in the
// scratch memory then. filled: they are already, unless heads have their own.
template <typename T, typename Visit>
void for_each_run(const RopeParams& p, const RopeTensor& tensor, const Token<double>* tokens,
                  int64_t count, Scratch<T>& scratch, bool filled, const Visit& visit) {
  if (p.angle_heads > 1) {
    for (int64_t head = 0; head < tensor.heads; ++head) {
      fill_block<T>(p, tensor, tokens, count, head, scratch);
      visit(Run{count, head, 1, false});
    }
    return;
  }
  if (!filled) fill_block<T>(p, tensor, tokens, count, 0, scratch);
  visit(Run{count, 0, tensor.heads, tensor.in_head < tensor.in_seq});
}

// Calls block(tokens, count) for the tokens begin..end-1, some at a time.
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
