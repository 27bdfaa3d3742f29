// RMSNorm of the rows that are to be rotated: weights in the order of the rotation's vectors, and
// sums of squares.
#pragma once

#include <cmath>
#include <numeric>

#include "common/rope_norm_params.h"
#include "cpu/rope/block.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// Brings the values of a row's dims (weights, say) to the order in which the kernels hold them: the
// first dims of all pairs, the second dims, those past the pairs; pairs as vectors hold them.
template <typename T, bool Interleaved, typename Number>
void order_dims(Number* row, int64_t half) {
  if constexpr (Interleaved) {
    Buffer<Number> second(half);
    for (int64_t i = 0; i < half; ++i) second[i] = row[2 * i + 1], row[i] = row[2 * i];
    std::copy_n(second.data(), half, row + half);
  } else if constexpr (kInWords<T, Interleaved>) {
    order_by_words(row, half);
    order_by_words(row + half, half);
  }
}

// [i]: the dim that is i-th in that order.
template <typename T, bool Interleaved>
Buffer<int32_t> ordered_dims(int64_t head_dim, int64_t half) {
  Buffer<int32_t> dims(head_dim);
  std::iota(dims.begin(), dims.end(), 0);
  order_dims<T, Interleaved>(dims.data(), half);
  return dims;
}

// One tensor's norm: its weights widened, in the order of order_dims.
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

  int64_t heads_per_mean;  // that share a mean square
  int64_t head_step;       // from the weights of one head to those of the next
  Buffer<Wide<T>> weight;
};

// Two vectors' worth of consecutive elements, in whatever order is cheapest.
template <typename T, typename V = WideVector<T>>
inline std::pair<V, V> load_two(const T* from) {
  if constexpr (std::is_same_v<T, bf16>) {
    return load_pairs(from);
  } else {
    return {load_wide(from), load_wide(from + Lanes<V>::count)};
  }
}

// The squares of a row of Dim elements, or if that is 0, of `dim`; summed but for the lanes.
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

// One element or a vector of them, widened.
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

// Calls visit(V(), i) for the dims begin..end-1, a vector or one of them at a time.
template <typename T, typename Visit>
inline void for_each_rest(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t lanes = Lanes<WideVector<T>>::count;
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) visit(WideVector<T>(), i);
  for (; i < end; ++i) visit(Wide<T>(), i);
}

inline float root(float x) { return std::sqrt(x); }
inline double root(double x) { return std::sqrt(x); }

template <typename V>
inline V root(V x) {
  for (int i = 0; i < Lanes<V>::count; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

}  // namespace
}  // namespace extrope
