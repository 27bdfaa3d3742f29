// RMSNorm of the rows that are to be rotated: weights in the order of the rotation's vectors, and
// sums of squares.
#pragma once

#include <cmath>

#include "common/rope_norm_params.h"
#include "cpu/rope/block.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// A row's dims as the kernels keep them between its reading and its writing: the first dims of all
// pairs, the second dims, those past the pairs; pairs in the order in which vectors hold them.
// place[i] is the dim that stands at i.
template <typename T, bool Interleaved>
Buffer<int32_t> places(int64_t head_dim, int64_t half) {
  Buffer<float> pair(half);
  for (int64_t i = 0; i < half; ++i) pair[i] = static_cast<float>(i);
  if constexpr (kInWords<T, Interleaved>) order_by_words(pair.data(), half);
  Buffer<int32_t> place(head_dim);
  for (int64_t i = 0; i < half; ++i) {
    const auto first = static_cast<int32_t>(pair[i]);
    place[i] = Interleaved ? 2 * first : first;
    place[half + i] = Interleaved ? 2 * first + 1 : static_cast<int32_t>(half) + first;
  }
  for (int64_t i = 2 * half; i < head_dim; ++i) place[i] = static_cast<int32_t>(i);
  return place;
}

// One tensor's norm in the form that rows take.
template <typename T>
struct Norm {
  Norm(const RopeNorm& norm, const RopeTensor& tensor, const Buffer<int32_t>& place)
      : together(norm.all_heads ? tensor.heads : 1),
        head_step(norm.all_heads ? place.size() : 0),
        weight(norm.weight ? together * place.size() : 0) {
    if (weight.empty()) return;
    switch (norm.weight_dtype) {
      case DType::f32:
        fill(static_cast<const float*>(norm.weight), place);
        break;
      case DType::f64:
        fill(static_cast<const double*>(norm.weight), place);
        break;
      case DType::bf16:
        fill(static_cast<const bf16*>(norm.weight), place);
        break;
      case DType::f16:
        fill(static_cast<const f16*>(norm.weight), place);
    }
  }

  template <typename Weight>
  void fill(const Weight* from, const Buffer<int32_t>& place) {
    const int64_t dim = place.size();
    for (int64_t row = 0; row < together * dim; row += dim) {
      for (int64_t i = 0; i < dim; ++i) {
        weight[row + i] = plain(static_cast<Wide<T>>(widen(from[row + place[i]])));
      }
    }
  }

  int64_t together;   // heads that share a mean square
  int64_t head_step;  // from the weights of one head to those of the next
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

// Of one row, in lanes that are still to be summed.
template <typename T>
EXTROPE_INLINE WideVector<T> squares_of(const T* row, int64_t dim) {
  using V = WideVector<T>;
  constexpr int64_t lanes = Lanes<V>::count;
  V first{}, second{};
  int64_t i = 0;
  for (; i + 2 * lanes <= dim; i += 2 * lanes) {
    const auto [a, b] = load_two(row + i);
    first += a * a, second += b * b;
  }
  for (; i < dim; ++i) first[0] += widen(row[i]) * widen(row[i]);
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
