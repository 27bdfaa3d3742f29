// RMSNorm and the rotation of rows, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/rope_params.h"
#include "cpu/rope/block.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// Reorders the values of a row's dims (weights, say) for the kernels: the first dims of all pairs,
// the second dims, then the dims that do not rotate; pairs are in the vectors' order.
template <typename T, bool Interleaved, typename Number>
void order_dims(const RopeParams& p, Number* row) {
  const int64_t half = p.rotary_dim / 2;
  if (p.rotary_offset > 0) {  // std::rotate would be one function of all instruction sets
    Buffer<Number> before(p.rotary_offset);
    std::copy_n(row, p.rotary_offset, before.data());
    std::copy_n(row + p.rotary_offset, p.rotary_dim, row);
    std::copy_n(before.data(), p.rotary_offset, row + p.rotary_dim);
  }
  if constexpr (Interleaved) {
    Buffer<Number> second(half);
    for (int64_t i = 0; i < half; ++i) second[i] = row[2 * i + 1], row[i] = row[2 * i];
    std::copy_n(second.data(), half, row + half);
  } else if constexpr (kInWords<T, Interleaved>) {
    order_by_words(row, half);
    order_by_words(row + half, half);
  }
}

// Returns the dims in that order.
template <typename T, bool Interleaved>
Buffer<int32_t> ordered_dims(const RopeParams& p) {
  Buffer<int32_t> dims(p.head_dim);
  std::iota(dims.begin(), dims.end(), 0);
  order_dims<T, Interleaved>(p, dims.data());
  return dims;
}

// The norm of one tensor: its weights widened, in the order of order_dims.
template <typename T>
struct Norm {
  template <typename Order>
  Norm(const RopeNorm& norm, const RopeTensor& tensor, int64_t dim, const Order& order)
      : heads_per_mean(norm.all_heads ? tensor.heads : 1),
        head_step(norm.all_heads ? dim : 0),
        weight(norm.weight ? heads_per_mean * dim : 0) {
    if (weight.empty()) return;
    switch (norm.weight_dtype) {
      case DType::f32:
        widen_weights(static_cast<const float*>(norm.weight));
        break;
      case DType::f64:
        widen_weights(static_cast<const double*>(norm.weight));
        break;
      case DType::bf16:
        widen_weights(static_cast<const bf16*>(norm.weight));
        break;
      case DType::f16:
        widen_weights(static_cast<const f16*>(norm.weight));
    }
    for (int64_t row = 0; row < heads_per_mean * dim; row += dim) order(&weight[row]);
  }

  template <typename Weight>
  void widen_weights(const Weight* from) {
    const int64_t count = weight.size();
    for (int64_t i = 0; i < count; ++i) weight[i] = plain(static_cast<Wide<T>>(widen(from[i])));
  }

  int64_t heads_per_mean;  // heads that share a mean square
  int64_t head_step;       // stride of heads' weights
  Buffer<Wide<T>> weight;
};

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
  Wide<T>* few() { return few_.data(); }
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

// Two vectors of consecutive elements, in the cheapest order.
template <typename T, typename V = WideVector<T>>
inline std::pair<V, V> load_two(const T* from) {
  if constexpr (std::is_same_v<T, bf16>) {
    return load_pairs(from);
  } else {
    return {load_wide(from), load_wide(from + Lanes<V>::count)};
  }
}

// Returns the sum of squares of a row of Dim elements (`dim` if Dim is 0), per lane.
template <int64_t Dim, typename T>
EXTROPE_INLINE WideVector<T> squares_of(const T* row, int64_t dim) {
  using V = WideVector<T>;
  constexpr int64_t kTwo = 2 * Lanes<V>::count;
  static_assert(Dim % kTwo == 0);
  V first{}, second{};
  const auto add_two = [&](int64_t i) __attribute__((always_inline)) {
    const auto [a, b] = load_two(row + i);
    first += a * a, second += b * b;
  };
  if constexpr (Dim > 0) {
    for (int64_t i = 0; i < Dim; i += kTwo) add_two(i);
  } else {
    int64_t i = 0;
    for (; i + kTwo <= dim; i += kTwo) add_two(i);
    for (; i < dim; ++i) first[0] += widen(row[i]) * widen(row[i]);
  }
  return first + second;
}

// Loads an element or a vector of elements, widened.
template <typename V, typename T>
inline V read(const T* from) {
  if constexpr (std::is_same_v<V, Wide<T>>) {
    return widen(*from);
  } else {
    return load_wide(from);
  }
}

template <typename V, typename T>
inline void write(T* to, V v) {
  if constexpr (std::is_same_v<V, Wide<T>>) {
    narrow(v, *to);
  } else {
    store_narrow(to, v);
  }
}

// Calls visit(V(), i, dim) for the dims that do not rotate, by vectors, then one by one; i is their
// place in the order of order_dims.
template <typename T, typename Visit>
inline void for_each_rest(const RopeParams& p, const Visit& visit) {
  constexpr int64_t lanes = Lanes<WideVector<T>>::count;
  const int64_t ends[] = {p.rotary_dim + p.rotary_offset, p.head_dim};
  int64_t i = p.rotary_dim, shift = p.rotary_dim;
  for (const int64_t end : ends) {  // those before the rotated dims; those after, in their place
    for (; i + lanes <= end; i += lanes) visit(WideVector<T>(), i, i - shift);
    for (; i < end; ++i) visit(Wide<T>(), i, i - shift);
    shift = 0;
  }
}

inline float root(float x) { return std::sqrt(x); }
inline double root(double x) { return std::sqrt(x); }

template <typename V>
inline V root(V x) {
  for (int i = 0; i < Lanes<V>::count; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// ---------------------------------------------------------------------------------------------
// Forward
//
// While some rows are rotated, the squares of the next rows are summed: memory is read all the
// time, and rows are still in the first-level cache for their second read. Rows with their own mean
// square go in groups of a vector's number of lanes, whose sums over lanes cost little together.
// Heads that share a mean square go by tokens.

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

// The same if all heads of a token share a mean square; each head has its own weights.
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

// ---------------------------------------------------------------------------------------------
// Backward

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
