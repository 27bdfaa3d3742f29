// The norm and the rotation of rows that each have a mean square of their own, forward.
//
// Rows go in groups: the sums over lanes of as many rows as a vector has lanes cost little
// together, and a group is still in the first-level cache when it is read again. The weights are
// part of the cosines and sines that a token's rows share.
#pragma once

#include "cpu/rope/norm.h"

namespace extrope {
namespace {

// cos and sin of each token of a block times the weights of the dims that they multiply.
template <typename T>
struct WeightedAngles {
  struct Factors {
    const Wide<T>*a_cos, *b_sin, *b_cos, *a_sin;
  };

  WeightedAngles(int64_t tokens, int64_t stride) : stride(stride), values(4 * tokens * stride) {}

  void fill(const Scratch<T>& scratch, int64_t tokens, const Wide<T>* weight) {
    using V = WideVector<T>;
    const int64_t half = scratch.half;
    for (int64_t t = 0; t < tokens; ++t) {
      const Angle<T> angle(scratch, t);
      Wide<T>* to = values.data() + 4 * t * stride;
      const auto some = [&](auto lanes, int64_t i) {
        using Some = decltype(lanes);
        const Some a = load<Some>(weight + i), b = load<Some>(weight + half + i);
        const Some c = load<Some>(angle.cos + i), s = load<Some>(angle.sin + i);
        store(to + i, a * c), store(to + stride + i, b * s);
        store(to + 2 * stride + i, b * c), store(to + 3 * stride + i, a * s);
      };
      for_each_rest<T>(0, half, some);
    }
  }

  Factors of(int64_t token) const {
    const Wide<T>* at = values.data() + 4 * token * stride;
    return {at, at + stride, at + 2 * stride, at + 3 * stride};
  }

  int64_t stride;
  Buffer<Wide<T>> values;
};

template <typename T, bool Interleaved>
struct NormForward {
  using V = WideVector<T>;
  static constexpr int kGroup = Lanes<V>::count;

  const RopeNormParams& p;
  const RopeTensor& x;
  const Wide<T>* weight;
  const Token<double>* tokens;
  const WeightedAngles<T>& angles;
  const Ahead& ahead;

  EXTROPE_INLINE void rotate(const T* in, T* out, typename WeightedAngles<T>::Factors by,
                             Wide<T> scale) const {
    const int64_t half = p.rotary_dim / 2;
    for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
      using Some = Pairs<T, Interleaved, decltype(width)::value>;
      using U = typename Some::V;
      Some row;
      row.load(in, half, i);
      for (int v = 0; v < Some::kCount; ++v) {
        const int64_t at = i + v * Some::kLanes;
        const U a = row.a[v] * scale, b = row.b[v] * scale;
        row.a[v] = a * load<U>(by.a_cos + at) - b * load<U>(by.b_sin + at);
        row.b[v] = b * load<U>(by.b_cos + at) + a * load<U>(by.a_sin + at);
      }
      row.store(out, half, i);
    });
    for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
      using U = decltype(lanes);
      write(out + i, read<U>(in + i) * scale * load<U>(weight + i));
    });
  }

  void rows(const Run& run) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(p.head_dim);
    const Wide<T> eps = static_cast<Wide<T>>(p.norm_eps);
    const int64_t next_group = distance(x.in_seq, x.in_head, x.heads, kGroup);
    Cursor at(run);
    for (int64_t left = run.tokens * run.heads; left > 0; left -= kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, left);
      const T* in[kGroup];
      T* out[kGroup];
      int64_t token[kGroup];
      V squares[kGroup] = {};
      for (int64_t i = 0; i < count; ++i, at.next()) {
        in[i] = input_row<T>(x, tokens[at.token], at.head);
        out[i] = output_row<T>(x, tokens[at.token], at.head);
        token[i] = at.token;
        squares[i] = squares_of(in[i], p.head_dim);
      }
      Wide<T> scale[kGroup];
      store(scale, Wide<T>{1} / root(sums_of(squares) * share + eps));
      for (int64_t i = 0; i < count; ++i) {
        fetch(in[i], next_group, ahead.bytes);
        if (!out[i]) continue;
        rotate(in[i], out[i], angles.of(token[i]), scale[i]);
        if (in[i] != out[i]) fetch(out[i], ahead.out, ahead.bytes);
      }
    }
  }
};

}  // namespace
}  // namespace extrope
