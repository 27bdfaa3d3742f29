// The norm and the rotation, backward.
#pragma once

#include "cpu/rope/norm.h"

namespace extrope {
namespace {

// The products weight * x * gradient rotated back of a row, summed but for the lanes.
template <typename T, bool Interleaved>
WideVector<T> products_of(const RopeParams& p, const T* grad, const T* saved, CosSin<T> cos_sin,
                          const Wide<T>* weight) {
  using V = WideVector<T>;
  const int64_t half = p.rotary_dim / 2;
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
    g.load(grad, half, i);
    g.rotate(cos_sin.cos, cos_sin.sin, i);
    x.load(saved, half, i);
    x.normalize(weight, half, Wide<T>{1}, i);
    for (int v = 0; v < g.kCount; ++v) add(x.a[v] * g.a[v] + x.b[v] * g.b[v]);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using U = decltype(lanes);
    add(read<U>(saved + i) * load<U>(weight + i) * read<U>(grad + i));
  });
  return products;
}

// dx = scale * (weight * g - normal * mean), where g is the gradient rotated back and normal is
// x * scale; mean is that of weight * g * normal.
template <typename T, bool Interleaved>
void norm_backward_row(const RopeParams& p, const T* grad, const T* saved, T* out,
                       CosSin<T> cos_sin, const Wide<T>* weight, Wide<T> scale, Wide<T> mean,
                       Wide<T>* weight_grad) {
  const int64_t half = p.rotary_dim / 2;
  const auto differentiate = [&](auto& g, auto normal, int64_t i) {
    using V = decltype(normal);
    store(weight_grad + i, load<V>(weight_grad + i) + g * normal);
    g = scale * (g * load<V>(weight + i) - normal * mean);
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad, half, i);
    g.rotate(cos_sin.cos, cos_sin.sin, i);
    x.load(saved, half, i);
    for (int v = 0; v < g.kCount; ++v) {
      const int64_t at = i + v * g.kLanes;
      differentiate(g.a[v], x.a[v] * scale, at);
      differentiate(g.b[v], x.b[v] * scale, half + at);
    }
    g.store(out, half, i);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using V = decltype(lanes);
    V g = read<V>(grad + i);
    differentiate(g, read<V>(saved + i) * scale, i);
    write(out + i, g);
  });
}

// The backward of one tensor of one block of tokens. Rows are read for their sums, then once more
// for their gradients: in groups whose sums over lanes cost little together, or, where all heads
// share a mean square, token by token.
template <typename T, bool Interleaved>
struct NormBackward {
  using V = WideVector<T>;
  static constexpr int kGroup = Lanes<V>::count;
  struct Sums {
    V squares, products;
  };

  const RopeNormParams& p;
  const RopeTensor& x;
  const Norm<T>& norm;
  const Token<double>* tokens;
  const Scratch<T>& scratch;
  const PrefetchDistances& ahead;
  Wide<T>* weight_grad;
  Sums of_tokens[kBlock];  // where all heads share a mean square

  void add_row(int64_t t, int64_t head, Sums& sums) const {
    const T* in = input_row<T>(x, tokens[t], head);
    const T* saved = saved_row<T>(x, tokens[t], head);
    prefetch(in, ahead.in, ahead.bytes);
    prefetch(saved, ahead.saved, ahead.bytes);
    sums.squares += squares_of<0>(saved, p.head_dim);
    sums.products += products_of<T, Interleaved>(p, in, saved, {scratch, t},
                                                 &norm.weight[head * norm.head_step]);
  }

  // Of a row, or of a vector of rows: one over the root mean square, and the mean of products.
  template <typename U>
  struct ScaleAndMean {
    U scale, mean;
  };

  template <typename U>
  ScaleAndMean<U> scale_and_mean(U squares, U products) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(norm.heads_per_mean * p.head_dim);
    const U scale = Wide<T>{1} / root(squares * share + static_cast<Wide<T>>(p.norm_eps));
    return {scale, products * scale * share};
  }

  void write_row(int64_t t, int64_t head, Wide<T> scale, Wide<T> mean) const {
    const T* in = input_row<T>(x, tokens[t], head);
    T* out = output_row<T>(x, tokens[t], head);
    norm_backward_row<T, Interleaved>(p, in, saved_row<T>(x, tokens[t], head), out, {scratch, t},
                                      &norm.weight[head * norm.head_step], scale, mean,
                                      weight_grad + head * norm.head_step);
    if (in != out) prefetch(out, ahead.out, ahead.bytes);
  }

  void run_per_head(Run run) const {
    Cursor read(run), written(run);
    V squares[kGroup] = {}, products[kGroup] = {};
    for (int64_t left = run.tokens * run.heads; left > 0; left -= kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, left);
      for (int64_t i = 0; i < count; ++i, read.next()) {
        Sums sums{};
        add_row(read.token, read.head, sums);
        squares[i] = sums.squares, products[i] = sums.products;
      }
      const auto [scale, mean] = scale_and_mean(sums_of(squares), sums_of(products));
      Wide<T> scales[kGroup], means[kGroup];
      store(scales, scale), store(means, mean);
      for (int64_t i = 0; i < count; ++i, written.next()) {
        write_row(written.token, written.head, scales[i], means[i]);
      }
    }
  }

  void run_all_heads(Run run) {
    ScaleAndMean<Wide<T>> shared;
    run.for_each_row([&](int64_t t, int64_t head) {
      if (run.of_heads && head == 0) {
        for (int64_t h = 0; h < run.heads; ++h) add_row(t, h, of_tokens[t]);
      }
      if (!run.of_heads || head == 0) {
        shared = scale_and_mean(sum_of(of_tokens[t].squares), sum_of(of_tokens[t].products));
      }
      write_row(t, head, shared.scale, shared.mean);
    });
  }

  template <typename EachRun>
  void run(const EachRun& each_run) {
    if (norm.head_step == 0) return each_run([&](Run run) { run_per_head(run); });
    each_run([&](Run run) {  // all sums first, where a token's heads do not lie together
      if (!run.of_heads) {
        run.for_each_row([&](int64_t t, int64_t h) { add_row(t, h, of_tokens[t]); });
      }
    });
    each_run([&](Run run) { run_all_heads(run); });
  }
};

}  // namespace
}  // namespace extrope
