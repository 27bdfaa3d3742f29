// What RMSNorm's forward and backward share: the order of a row's dims, weights, and sums of
// squares.
#pragma once

#include <cmath>
#include <numeric>

#include "common/rope_params.h"
#include "cpu/rope/pairs.h"
#include "cpu/runtime/buffer.h"

namespace extrope {
namespace {

// Reorders the values of a row's dims (weights, say) for the kernels, with pairs in the vectors'
// order, and the dims that do not rotate behind them:
//
//   in a row:    | before | first dims of pairs | second dims | after |
//   reordered:   | first dims of pairs | second dims | before | after |
//
// There are rotary_offset dims before, and rotary_dim / 2 pairs. If Interleaved, a row has the two
// dims of a pair side by side.
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

// Returns the dims of a row in that order.
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
    for (int64_t i = 0; i < count; ++i) {  // store_plain wants NaNs without payloads
      weight[i] = clear_nan_payloads(static_cast<Wide<T>>(widen(from[i])));
    }
  }

  int64_t heads_per_mean;  // heads that share a mean square: 1, or all
  int64_t head_step;       // from a head's weights to the next one's; 0 if heads share them
  Buffer<Wide<T>> weight;  // empty: this tensor has no norm
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

}  // namespace
}  // namespace extrope
