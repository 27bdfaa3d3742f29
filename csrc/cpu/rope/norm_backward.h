// The backward of RMSNorm and the rotation.
#pragma once

#include "cpu/rope/cos_sin.h"
#include "cpu/rope/norm.h"
#include "cpu/rope/prefetch.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// The gradient of a norm's weights, summed over rows; in the order of order_dims. If all heads
// share the weights, a few rows are added in sequence before their sum joins the rest: in a longer
// chain roundings do not average out.
template <typename T>
class WeightGrad {
 public:
  void start(const Norm<T>& norm) {
    few_.assign(norm.weight.size(), 0), all_.assign(norm.weight.size(), 0);
    by_rows_ = norm.head_step == 0;
  }
  Wide<T>* few() { return few_.data(); }  // to add a row's gradient to; then call end_row()
  void end_row() {
    if (by_rows_ && ++rows_ % kRows == 0) join();
  }
  const Buffer<Wide<T>>& end() {
    join();
    return all_;
  }

 private:
  static constexpr int64_t kRows = 32;

  void join() {
    const int64_t dims = all_.size();
    for (int64_t i = 0; i < dims; ++i) all_[i] += few_[i], few_[i] = 0;
  }

  Buffer<Wide<T>> few_, all_;  // the sum of the last rows, and of all before
  int64_t rows_ = 0;
  bool by_rows_ = false;
};

// Returns the sum of weight * x * (gradient rotated back) over a row, per lane.
template <typename T, bool Interleaved>
WideVector<T> products_of(const RopeParams& p, const T* grad, const T* saved,
                          TokenCosSin<T> cos_sin, const Wide<T>* weight) {
  using V = WideVector<T>;
  const int64_t half = p.rotary_dim / 2, first = p.rotary_offset;
  V products{};
  const auto add = [&](auto term) {
    if constexpr (std::is_same_v<decltype(term), V>) {
      products += term;
    } else {
      products[0] += term;
    }
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad + first, half, i);
    g.rotate(cos_sin.cos, cos_sin.sin, i);
    x.load(saved + first, half, i);
    x.normalize(weight, half, Wide<T>{1}, i);
    for (int v = 0; v < g.kCount; ++v) add(x.a[v] * g.a[v] + x.b[v] * g.b[v]);
  });
  for_each_rest<T>(p, [&](auto lanes, int64_t i, int64_t dim) {
    using U = decltype(lanes);
    add(read<U>(saved + dim) * load<U>(weight + i) * read<U>(grad + dim));
  });
  return products;
}

// dx = scale * (weight * g - normal * mean), where g is the gradient rotated back, normal is
// x * scale, and mean is the mean of weight * g * normal.
template <typename T, bool Interleaved>
void norm_backward_row(const RopeParams& p, const T* grad, const T* saved, T* out,
                       TokenCosSin<T> cos_sin, const Wide<T>* weight, Wide<T> scale, Wide<T> mean,
                       Wide<T>* weight_grad) {
  const int64_t half = p.rotary_dim / 2, first = p.rotary_offset;
  const auto differentiate = [&](auto& g, auto normal, int64_t i) {
    using V = decltype(normal);
    store(weight_grad + i, load<V>(weight_grad + i) + g * normal);
    g = scale * (g * load<V>(weight + i) - normal * mean);
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad + first, half, i);
    g.rotate(cos_sin.cos, cos_sin.sin, i);
    x.load(saved + first, half, i);
    for (int v = 0; v < g.kCount; ++v) {
      const int64_t at = i + v * g.kLanes;
      differentiate(g.a[v], x.a[v] * scale, at);
      differentiate(g.b[v], x.b[v] * scale, half + at);
    }
    g.store(out + first, half, i);
  });
  for_each_rest<T>(p, [&](auto lanes, int64_t i, int64_t dim) {
    using V = decltype(lanes);
    V g = read<V>(grad + dim);
    differentiate(g, read<V>(saved + dim) * scale, i);
    write(out + dim, g);
  });
}

// The backward of one tensor of a block of tokens. A row is read for its sums, then once more for
// its gradients; if all heads of a token share a mean square, the whole block is read first.
template <typename T, bool Interleaved>
struct NormBackward {
  struct RowSums {
    WideVector<T> squares, products;  // per lane
  };
  // One over the root mean square, and the mean of products times it.
  struct RowFactors {
    Wide<T> scale, mean;
  };

  const RopeNormParams& p;
  const RopeTensor& x;
  const Norm<T>& norm;
  const Token<double>* tokens;
  const AngleScratch<T>& scratch;
  const PrefetchDistances& ahead;
  WeightGrad<T>& weight_grad;

  void add_row(int64_t t, int64_t head, RowSums& sums) const {
    const T* in = input_row<T>(x, tokens[t], head);
    const T* saved = saved_row<T>(x, tokens[t], head);
    prefetch(in, ahead.in, ahead.bytes);
    prefetch(saved, ahead.saved, ahead.bytes);
    sums.squares += squares_of<0>(saved, p.head_dim);
    sums.products += products_of<T, Interleaved>(p, in, saved, {scratch, t},
                                                 &norm.weight[head * norm.head_step]);
  }

  RowFactors factors_of(const RowSums& sums) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(norm.heads_per_mean * p.head_dim);
    const Wide<T> mean_square = sum_of(sums.squares) * share;
    const Wide<T> scale = Wide<T>{1} / root(mean_square + static_cast<Wide<T>>(p.norm_eps));
    return {scale, sum_of(sums.products) * scale * share};
  }

  void write_row(int64_t t, int64_t head, RowFactors factors) const {
    const T* in = input_row<T>(x, tokens[t], head);
    T* out = output_row<T>(x, tokens[t], head);
    norm_backward_row<T, Interleaved>(p, in, saved_row<T>(x, tokens[t], head), out, {scratch, t},
                                      &norm.weight[head * norm.head_step], factors.scale,
                                      factors.mean, weight_grad.few() + head * norm.head_step);
    weight_grad.end_row();
    if (in != out) prefetch(out, ahead.out, ahead.bytes);
  }

  template <typename EachRun>
  void run(const EachRun& each_run) const {
    const bool all_heads = norm.head_step > 0;
    RowFactors of_tokens[kBlock];
    if (all_heads) {
      RowSums sums[kBlock] = {};
      each_run([&](Run run) {
        run.for_each_row([&](int64_t t, int64_t head) { add_row(t, head, sums[t]); });
      });
      for (int64_t t = 0; t < kBlock; ++t) of_tokens[t] = factors_of(sums[t]);
    }
    each_run([&](Run run) {
      run.for_each_row([&](int64_t t, int64_t head) {
        RowSums sums{};
        if (!all_heads) add_row(t, head, sums);
        write_row(t, head, all_heads ? of_tokens[t] : factors_of(sums));
      });
    });
  }
};

}  // namespace
}  // namespace extrope
