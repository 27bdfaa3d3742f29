// RMSNorm and the rotation of rows with a mean square each.
//
// While some rows are rotated, the squares of the next rows are summed: memory is read all the
// time, and rows are still in the first-level cache for their second read. Rows go in groups of a
// vector's number of lanes, whose sums over lanes cost little together.
#pragma once

#include <algorithm>

#include "cpu/rope/cos_sin.h"
#include "cpu/rope/norm.h"
#include "cpu/rope/prefetch.h"
#include "cpu/rope/row_form.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// cos and sin of a token, each times the norm's weight of the dim that it multiplies: a and b are
// the first and the second dim of a pair. For heads that share their weights.
template <typename T, int64_t Half>
struct WeightedCosSin {
  PairProducts<T, Half> a_cos, b_sin, b_cos, a_sin;

  WeightedCosSin(const Wide<T>* weight, int64_t half, const TokenCosSin<T>& cos_sin)
      : a_cos{weight, cos_sin.cos},
        b_sin{weight + half, cos_sin.sin},
        b_cos{weight + half, cos_sin.cos},
        a_sin{weight, cos_sin.sin} {}
};

// One tensor of a block of tokens; each head has its own mean square.
template <typename T, bool Interleaved, typename Form>
struct PerHeadNorm {
  using V = WideVector<T>;
  static constexpr int kGroup = Lanes<V>::count;
  static constexpr int64_t kHalf = Form::kHalf;

  const RopeNormParams& p;
  const RopeTensor& x;
  const Wide<T>* weight;
  const Token<double>* tokens;
  const AngleScratch<T>& scratch;
  const PrefetchDistances& ahead;

  EXTROPE_INLINE void rotate(const T* in, T* out, const WeightedCosSin<T, kHalf>& weighted,
                             Wide<T> scale) const {
    const int64_t half = kHalf > 0 ? kHalf : p.rotary_dim / 2;
    const int64_t first = kHalf > 0 ? 0 : p.rotary_offset;
    for_each_pairs<T, Interleaved, kHalf>(
        half, [&](auto width, int64_t i) __attribute__((always_inline)) {
          using PairVectors = Pairs<T, Interleaved, decltype(width)::value>;
          using U = typename PairVectors::V;
          PairVectors row;
          row.load(in + first, half, i);
          for (int v = 0; v < PairVectors::kCount; ++v) {
            const int64_t at = i + v * PairVectors::kLanes;
            const U a = row.a[v] * scale, b = row.b[v] * scale;
            row.a[v] = a * values_at<U>(weighted.a_cos, at) - b * values_at<U>(weighted.b_sin, at);
            row.b[v] = b * values_at<U>(weighted.b_cos, at) + a * values_at<U>(weighted.a_sin, at);
          }
          row.template store<Form::kStreams>(out + first, half, i);
        });
    if constexpr (kHalf > 0) return;
    for_each_rest<T>(p, [&](auto lanes, int64_t i, int64_t dim) {
      using U = decltype(lanes);
      write(out + dim, read<U>(in + dim) * scale * load<U>(weight + i));
    });
  }

  EXTROPE_INLINE V squares_of_next(Inputs<T>& inputs) const {
    return squares_of<2 * kHalf>(inputs.next(), p.head_dim);
  }

  // Rows go in groups of kGroup. While row i of a group is rotated, the squares of row i of the
  // next group are summed, in its place:
  //
  //   | rotated                    | scale known | squares summed | not read |
  //   | earlier groups | i rows of | the rest of | i rows of      |          |
  //   |                | the group | the group   | the next group |          |
  void norm_and_rotate(const Run& run) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(p.head_dim);
    const Wide<T> eps = static_cast<Wide<T>>(p.norm_eps);
    const int64_t far = ahead.in_behind(x, kGroup);
    const int64_t in_step = x.in_head, out_step = x.out_head;
    const int64_t bytes = kHalf > 0 ? 2 * kHalf * sizeof(T) : ahead.bytes;
    Inputs<T> inputs(x, tokens, run);
    Cursor at(run);
    V squares[kGroup] = {};
    int64_t left = run.tokens * run.heads;  // rows from the current group on
    for (int64_t i = 0; i < std::min<int64_t>(kGroup, left); ++i)
      squares[i] = squares_of_next(inputs);
    for (; left > 0; left -= kGroup) {
      Wide<T> scale[kGroup];
      store(scale, Wide<T>{1} / root(sums_of(squares) * share + eps));
      const int64_t count = std::min<int64_t>(kGroup, left);
      for (int64_t i = 0; i < count;) {  // a token's heads of this group at a time
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

}  // namespace
}  // namespace extrope
