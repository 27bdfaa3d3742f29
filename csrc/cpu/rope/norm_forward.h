// The norm and the rotation, forward.
//
// While some rows are rotated the squares of those that come next are summed: memory is read all
// the time, and rows are still in the first-level cache when they are read again. Rows that each
// have a mean square of their own go in groups: the sums over lanes of as many rows as a vector has
// lanes cost little together. Heads that share a mean square go by tokens.
#pragma once

#include "cpu/rope/norm.h"

namespace extrope {
namespace {

// cos and sin of a token, each times the norm's weight of the dim that it multiplies: a and b are
// the first and the second dim of a pair. For heads that all have the same weights.
template <typename T, int64_t Half>
struct WeightedCosSin {
  PairProducts<T, Half> a_cos, b_sin, b_cos, a_sin;

  WeightedCosSin(const Wide<T>* weight, int64_t half, const CosSin<T>& cos_sin)
      : a_cos{weight, cos_sin.cos},
        b_sin{weight + half, cos_sin.sin},
        b_cos{weight + half, cos_sin.cos},
        a_sin{weight, cos_sin.sin} {}
};

// One tensor of one block of tokens, each head of which has a mean square of its own.
template <typename T, bool Interleaved, typename Form>
struct PerHeadNorm {
  using V = WideVector<T>;
  static constexpr int kGroup = Lanes<V>::count;
  static constexpr int64_t kHalf = Form::kHalf;

  const RopeNormParams& p;
  const RopeTensor& x;
  const Wide<T>* weight;
  const Token<double>* tokens;
  const Scratch<T>& scratch;
  const PrefetchDistances& ahead;

  EXTROPE_INLINE void rotate(const T* in, T* out, const WeightedCosSin<T, kHalf>& weighted,
                             Wide<T> scale) const {
    const int64_t half = kHalf > 0 ? kHalf : p.rotary_dim / 2;
    for_each_pairs<T, Interleaved, kHalf>(
        half, [&](auto width, int64_t i) __attribute__((always_inline)) {
          using PairVectors = Pairs<T, Interleaved, decltype(width)::value>;
          using U = typename PairVectors::V;
          PairVectors row;
          row.load(in, half, i);
          for (int v = 0; v < PairVectors::kCount; ++v) {
            const int64_t at = i + v * PairVectors::kLanes;
            const U a = row.a[v] * scale, b = row.b[v] * scale;
            row.a[v] = a * values_at<U>(weighted.a_cos, at) - b * values_at<U>(weighted.b_sin, at);
            row.b[v] = b * values_at<U>(weighted.b_cos, at) + a * values_at<U>(weighted.a_sin, at);
          }
          row.template store<Form::kStreams>(out, half, i);
        });
    if constexpr (kHalf > 0) return;
    for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
      using U = decltype(lanes);
      write(out + i, read<U>(in + i) * scale * load<U>(weight + i));
    });
  }

  EXTROPE_INLINE V squares_of_next(Inputs<T>& inputs) const {
    return squares_of<2 * kHalf>(inputs.next(), p.head_dim);
  }

  void norm_and_rotate(const Run& run) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(p.head_dim);
    const Wide<T> eps = static_cast<Wide<T>>(p.norm_eps);
    const int64_t far = ahead.in_behind(x, kGroup);
    const int64_t in_step = x.in_head, out_step = x.out_head;
    const int64_t bytes = kHalf > 0 ? 2 * kHalf * sizeof(T) : ahead.bytes;
    Inputs<T> inputs(x, tokens, run);
    Cursor at(run);
    V squares[kGroup] = {};
    int64_t left = run.tokens * run.heads;
    for (int64_t i = 0; i < std::min<int64_t>(kGroup, left); ++i)
      squares[i] = squares_of_next(inputs);
    for (; left > 0; left -= kGroup) {
      Wide<T> scale[kGroup];
      store(scale, Wide<T>{1} / root(sums_of(squares) * share + eps));
      const int64_t count = std::min<int64_t>(kGroup, left);
      for (int64_t i = 0; i < count;) {
        const WeightedCosSin<T, kHalf> weighted(weight, p.rotary_dim / 2, {scratch, at.token});
        const int64_t end = std::min(count, i + at.left_of_token());
        const T* in = input_row<T>(x, tokens[at.token], at.head);
        T* out = output_row<T>(x, tokens[at.token], at.head);
        at.skip_of_token(end - i);
        for (; i < end; ++i) {
          if (i < left - kGroup) squares[i] = squares_of_next(inputs);
          prefetch(in, far, bytes);
          if (out) {
            rotate(in, out, weighted, scale[i]);
            if (in != out && !Form::kStreams) prefetch(out, ahead.out, bytes);
            out += out_step;
          }
          in += in_step;
        }
      }
    }
  }
};

// The same where all heads of a token share a mean square, each head with its own weights.
template <typename T, bool Interleaved, typename Form>
struct AllHeadsNorm {
  using V = WideVector<T>;
  static constexpr int64_t kHalf = Form::kHalf;
  // Rows that are rotated between the last that a scale comes from and the first that takes it: a
  // root and a division take long.
  static constexpr int64_t kBetween = 4;

  const RopeNormParams& p;
  const RopeTensor& x;
  const Norm<T>& norm;
  const Token<double>* tokens;
  const Scratch<T>& scratch;
  const PrefetchDistances& ahead;
  Wide<T> scales[kBlock];  // of the tokens of a block

  // Whether norm_and_rotate() sums squares as it goes; otherwise measure() has to come before.
  bool by_tokens() const { return x.in_head < x.in_seq && p.angle_heads == 1; }

  Wide<T> scale_of(V squares) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(norm.heads_per_mean * p.head_dim);
    return Wide<T>{1} / root(sum_of(squares) * share + static_cast<Wide<T>>(p.norm_eps));
  }

  // The scales of `count` tokens, in a pass of its own.
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

  // Cosines or sines of Half pairs have the scale in them.
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
    for_each_pairs<T, Interleaved, kHalf>(
        half, [&](auto width, int64_t i) __attribute__((always_inline)) {
          Pairs<T, Interleaved, decltype(width)::value> row;
          row.load(in, half, i);
          row.normalize(weight, half, kHalf > 0 ? Wide<T>{1} : scale, i);
          row.rotate(cos, sin, i);
          row.template store<Form::kStreams>(out, half, i);
        });
    if constexpr (kHalf > 0) return;
    for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
      using U = decltype(lanes);
      write(out + i, read<U>(in + i) * scale * load<U>(weight + i));
    });
  }

  // `count` heads of a token; before each of them, visit().
  template <typename Visit>
  EXTROPE_INLINE void norm_and_rotate_heads(int64_t t, int64_t head, int64_t count, int64_t far,
                                            const Visit& visit) const {
    const Wide<T> scale = scales[t];
    const CosSin<T> cos_sin(scratch, t);
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
