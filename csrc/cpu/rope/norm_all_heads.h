// RMSNorm and the rotation of tokens whose heads share a mean square.
//
// While a token is rotated, the squares of the next one are summed, as in norm_per_head.h.
#pragma once

#include "cpu/rope/cos_sin.h"
#include "cpu/rope/norm.h"
#include "cpu/rope/prefetch.h"
#include "cpu/rope/row_form.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// One tensor of a block of tokens whose heads share a mean square; each head has its own weights.
template <typename T, bool Interleaved, typename Form>
struct AllHeadsNorm {
  using V = WideVector<T>;
  static constexpr int64_t kHalf = Form::kHalf;
  // Rows rotated between the last row of a mean square and the first use of its scale: a root and a
  // division take long.
  static constexpr int64_t kBetween = 4;

  const RopeNormParams& p;
  const RopeTensor& x;
  const Norm<T>& norm;
  const Token<double>* tokens;
  const AngleScratch<T>& scratch;
  const PrefetchDistances& ahead;
  Wide<T> scales[kBlock];  // scales of a block's tokens

  // True if norm_and_rotate() sums squares itself; otherwise measure() must run first.
  bool by_tokens() const { return x.in_head < x.in_seq && p.angle_heads == 1; }

  Wide<T> scale_of(V squares) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(norm.heads_per_mean * p.head_dim);
    return Wide<T>{1} / root(sum_of(squares) * share + static_cast<Wide<T>>(p.norm_eps));
  }

  // Computes the scales of `count` tokens in a separate pass.
  void measure(int64_t count) {
    V squares[kBlock] = {};
    const Run all{count, 0, x.heads, false};
    all.for_each_row([&](int64_t t, int64_t head) {
      const T* row = input_row<T>(x, tokens[t], head);
      prefetch(row, ahead.in, ahead.bytes);
      squares[t] += squares_of<2 * kHalf>(row, p.head_dim);
    });
    for (int64_t t = 0; t < count; ++t) scales[t] = scale_of(squares[t]);
  }

  // Multiplies cosines or sines of Half pairs by the scale.
  static EXTROPE_INLINE auto scaled(const Wide<T>* from, Wide<T> scale) {
    if constexpr (kHalf > 0) {
      return InMemory<T, kHalf>(from, scale);
    } else {
      return from;
    }
  }

  template <typename Values>
  EXTROPE_INLINE void rotate(const T* in, T* out, const Values& cos, const Values& sin,
                             const Wide<T>* weight, Wide<T> scale) const {
    const int64_t half = kHalf > 0 ? kHalf : p.rotary_dim / 2;
    const int64_t first = kHalf > 0 ? 0 : p.rotary_offset;
    for_each_pairs<T, Interleaved, kHalf>(
        half, [&](auto width, int64_t i) __attribute__((always_inline)) {
          Pairs<T, Interleaved, decltype(width)::value> row;
          row.load(in + first, half, i);
          row.normalize(weight, half, kHalf > 0 ? Wide<T>{1} : scale, i);
          row.rotate(cos, sin, i);
          row.template store<Form::kStreams>(out + first, half, i);
        });
    if constexpr (kHalf > 0) return;
    for_each_rest<T>(p, [&](auto lanes, int64_t i, int64_t dim) {
      using U = decltype(lanes);
      write(out + dim, read<U>(in + dim) * scale * load<U>(weight + i));
    });
  }

  // Rotates `count` heads of a token; calls visit() before each.
  template <typename Visit>
  EXTROPE_INLINE void norm_and_rotate_heads(int64_t t, int64_t head, int64_t count, int64_t far,
                                            const Visit& visit) const {
    const Wide<T> scale = scales[t];
    const TokenCosSin<T> cos_sin(scratch, t);
    const auto cos = scaled(cos_sin.cos, scale), sin = scaled(cos_sin.sin, scale);
    const T* in = input_row<T>(x, tokens[t], head);
    T* out = output_row<T>(x, tokens[t], head);
    const Wide<T>* weight = &norm.weight[head * norm.head_step];
    const int64_t in_step = x.in_head, out_step = x.out_head, weight_step = norm.head_step;
    const int64_t bytes = kHalf > 0 ? 2 * kHalf * sizeof(T) : ahead.bytes;
    const int64_t written = ahead.out;
    if (!out) {
      for (; count > 0; --count) visit();
      return;
    }
    for (; count > 0; --count) {
      visit();
      prefetch(in, far, bytes);
      rotate(in, out, cos, sin, weight, scale);
      if (in != out && !Form::kStreams) prefetch(out, written, bytes);
      out += out_step;
      in += in_step, weight += weight_step;
    }
  }

  void norm_and_rotate(const Run& run) {
    if (!by_tokens()) {
      return run.for_each_row(
          [&](int64_t t, int64_t head) { norm_and_rotate_heads(t, head, 1, 0, [] {}); });
    }
    const T* row = input_row<T>(x, tokens[0], 0);
    V sum{};
    int64_t token = 0, head = 0;
    const auto measure_row = [&]() __attribute__((always_inline)) {
      if (token == run.tokens) return;
      sum += squares_of<2 * kHalf>(row, p.head_dim);
      row += x.in_head;
      if (++head < run.heads) return;
      scales[token] = scale_of(sum);
      head = 0, sum = V{};
      if (++token < run.tokens) row = input_row<T>(x, tokens[token], 0);
    };
    for (int64_t i = 0; i < run.heads + kBetween; ++i) measure_row();
    const int64_t far = ahead.in_behind(x, run.heads + kBetween);
    for (int64_t t = 0; t < run.tokens; ++t) {
      norm_and_rotate_heads(t, 0, run.heads, far, measure_row);
    }
  }
};

}  // namespace
}  // namespace extrope
