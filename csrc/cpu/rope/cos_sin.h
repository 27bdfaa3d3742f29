// The cosines and sines of a block of tokens.
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
      store(&row[i], clear_nan_payloads(load<doubles>(&row[i])));
    }
    if (in_words) order_by_words(row.data(), half);
  }

  int64_t half, stride;
  bool in_words;
  Buffer<double> freq, decay;
  Buffer<double> positions, angles, exponents;  // of one token: by axis, by pair, by pair
  Buffer<Wide<T>> cos, sin;
};

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
    const double position = p.axes ? 1.0 : clear_nan_payloads(tokens[t].position);
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

}  // namespace
}  // namespace extrope
