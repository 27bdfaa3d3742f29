// What the kernels of the rotation share: the cosines and sines of a block of tokens.
#pragma once

#include <algorithm>
#include <tuple>

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

// Brings numbers of `half` pairs to the order in which rotate_row reads words.
template <typename Number>
void order_by_words(Number* row, int64_t half) {
  using V = std::conditional_t<sizeof(Number) == sizeof(double), doubles, floats>;
  constexpr int kLanes = Lanes<V>::count, kVectors = kFloats / kLanes;
  for (int64_t first = 0; first + 2 * kFloats <= half; first += 2 * kFloats, row += 2 * kFloats) {
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

// Cosines and sines of one block of tokens, and the padded frequencies and decays that they are
// made from.
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
      moved_freq.resize(stride);
      moved_decay.resize(decay.size());
    } else {
      settle(decay);
    }
  }

  // Numbers of pairs as fill_sincos takes them: in the order of cos and sin, and without payloads
  // of NaNs, which makes those plain.
  void settle(Buffer<double>& of_pairs) const {
    if (of_pairs.empty()) return;
    for (int64_t i = 0; i < stride; i += kDoubles) {
      store(&of_pairs[i], plain(load<doubles>(&of_pairs[i])));
    }
    if (in_words) order_by_words(of_pairs.data(), half);
  }

  int64_t half, stride;
  bool in_words;
  Buffer<double> freq, decay;
  Buffer<double> positions, moved_freq, moved_decay;  // of one token, by axis and by pair
  Buffer<Wide<T>> cos, sin;
};

// How the rows of one tensor are rotated: Half pairs each, which are all of their dims, or if that
// is 0 any number of pairs. Past: they are written past the caches.
template <int64_t Half, bool Past>
struct FormOf {
  static constexpr int64_t kHalf = Half;
  static constexpr bool kPast = Past;
};

// visit(FormOf), where Half is of the most common rows alone, and of those only where registers
// hold the numbers of so many pairs.
template <typename T, typename Visit>
auto with_form(const RopeParams& p, const RopeTensor& x, const Visit& visit) {
  if constexpr (kFloats == 16 && sizeof(T) <= sizeof(float)) {
    const int64_t dims = p.rotary_dim == p.head_dim ? p.head_dim : 0;
    if constexpr (kStoresLines<T>) {
      const bool past = past_caches<T>(p, x);
      if (past && dims == 64) return visit(FormOf<32, true>());
      if (past && dims == 128) return visit(FormOf<64, true>());
    }
    if (dims == 64) return visit(FormOf<32, false>());
    if (dims == 128) return visit(FormOf<64, false>());
  }
  return visit(FormOf<0, false>());
}

// Cosines and sines of one token.
template <typename T>
struct Angle {
  Angle(const Scratch<T>& scratch, int64_t token)
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
  if (!p.axes) scratch.settle(scratch.freq);
}

inline double position_on(const RopeParams& p, const Token<double>& token, int64_t axis) {
  const int64_t index =
      axis * p.position_axis + token.batch * p.position_batch + token.seq * p.position_seq;
  return read_position<double>(p, index) + static_cast<double>(p.offset);
}

// Multiplies frequencies and decays by the position on each pair's axis.
template <typename T>
void move_by_axis(const RopeParams& p, const Token<double>& token, Scratch<T>& scratch) {
  for (int64_t axis = 0; axis < p.num_axes; ++axis) {
    scratch.positions[axis] = position_on(p, token, axis);
  }
  for (int64_t i = 0; i < scratch.half; ++i) {
    const double position = scratch.positions[p.axes[i]];
    scratch.moved_freq[i] = scratch.freq[i] * position;
    if (p.log_decay) scratch.moved_decay[i] = scratch.decay[i] * (position - p.decay_origin);
  }
  scratch.settle(scratch.moved_freq);
  scratch.settle(scratch.moved_decay);
}

// Numbers that are given, widened, in the order of cos and sin.
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

// Copies wait for memory while angles are computed; therefore the ones go between the others, once
// a block.
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
    if (p.axes) move_by_axis(p, tokens[t], scratch);
    const double position = p.axes ? 1.0 : plain(tokens[t].position);
    const auto& freq = p.axes ? scratch.moved_freq : scratch.freq;
    const auto& decay = p.axes ? scratch.moved_decay : scratch.decay;
    const double from_origin = p.axes ? 1.0 : position - p.decay_origin;
    const Angles angles{position, p.amplitude, tensor.decay_sign * from_origin,
                        p.log_decay ? decay.data() : nullptr, p.conjugate};
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
