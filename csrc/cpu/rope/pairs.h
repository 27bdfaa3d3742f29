// Rows as pairs of dims in vectors, and their rotation.
#pragma once

#include <tuple>
#include <type_traits>

#include "cpu/simd/pairs.h"

namespace extrope {
namespace {

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
using WideVector = std::conditional_t<std::is_same_v<T, double>, doubles, floats>;

// One value per pair of Half pairs (their cosines, say), kept in registers from row to row.
template <typename T, int64_t Half>
struct InRegisters {
  static constexpr int64_t kLanes = Lanes<WideVector<T>>::count;
  WideVector<T> vectors[Half / kLanes];

  explicit InRegisters(const Wide<T>* from) {
    for (int64_t i = 0; i < Half; i += kLanes) {
      vectors[i / kLanes] = load<WideVector<T>>(from + i);
    }
  }
  InRegisters(const Wide<T>* a, const Wide<T>* b) : InRegisters(a) { *this *= InRegisters(b); }

  InRegisters& operator*=(const InRegisters& factors) {
    for (int64_t i = 0; i < Half / kLanes; ++i) vectors[i] *= factors.vectors[i];
    return *this;
  }
};

// The same in memory, times a factor: for rows whose other values need the registers.
template <typename T, int64_t Half>
struct InMemory {
  alignas(64) Wide<T> values[Half];

  InMemory(const Wide<T>* from, Wide<T> factor) {
    using V = WideVector<T>;
    for (int64_t i = 0; i < Half; i += Lanes<V>::count) {
      store(values + i, load<V>(from + i) * factor);
    }
  }
};

// Products of values in memory, computed at each use.
template <typename T>
struct LazyProduct {
  const Wide<T>*a, *b;
};

// One value per pair, and products of two of them. Half is 0 if a row may have any number of pairs:
// those values stay in memory.
template <typename T, int64_t Half>
using PairValues = std::conditional_t<(Half > 0), InRegisters<T, Half>, const Wide<T>*>;
template <typename T, int64_t Half>
using PairProducts = std::conditional_t<(Half > 0), InRegisters<T, Half>, LazyProduct<T>>;

// Returns the values of a vector of pairs, or of one pair, from pair i on.
template <typename V, typename T>
EXTROPE_INLINE V values_at(const T* from, int64_t i) {
  return load<V>(from + i);
}
template <typename V, typename T>
EXTROPE_INLINE V values_at(const LazyProduct<T>& product, int64_t i) {
  return load<V>(product.a + i) * load<V>(product.b + i);
}
template <typename V, typename T, int64_t Half>
EXTROPE_INLINE V values_at(const InRegisters<T, Half>& held, int64_t i) {
  static_assert(sizeof(V) == sizeof(held.vectors[0]));
  return held.vectors[i / held.kLanes];
}
template <typename V, typename T, int64_t Half>
EXTROPE_INLINE V values_at(const InMemory<T, Half>& held, int64_t i) {
  return in_register(load<V>(held.values + i));
}

// Half-split dims of 16 bits are read as 32-bit words of two neighbours, so that none has to move.
// A vector of words gives a vector of even dims and one of odd dims; cos and sin have that order
// too.
template <typename T, bool Interleaved>
constexpr bool kInWords = std::is_same_v<T, bf16> && !Interleaved;

// Both dims, a and b, of some pairs: Vectors vectors of pairs (two if kInWords), or with 0 a single
// pair.
template <typename T, bool Interleaved, int Vectors>
struct Pairs {
  using V = std::conditional_t<Vectors == 0, Wide<T>, WideVector<T>>;
  static constexpr int kCount = Vectors == 0 ? 1 : Vectors;
  static constexpr int64_t kLanes = sizeof(V) / sizeof(Wide<T>);
  V a[kCount], b[kCount];

  // Loads pairs from pair i on, of a row whose first `half` pairs of dims rotate.
  EXTROPE_INLINE void load(const T* row, int64_t half, int64_t i) {
    if constexpr (Vectors == 0) {
      a[0] = widen(row[Interleaved ? 2 * i : i]);
      b[0] = widen(row[Interleaved ? 2 * i + 1 : half + i]);
    } else if constexpr (Interleaved) {
      std::tie(a[0], b[0]) = load_pairs(row + 2 * i);
    } else if constexpr (Vectors == 2) {
      std::tie(a[0], a[1]) = load_pairs(row + i);
      std::tie(b[0], b[1]) = load_pairs(row + half + i);
    } else {
      a[0] = load_wide(row + i), b[0] = load_wide(row + half + i);
    }
  }

  template <bool Streaming = false>
  EXTROPE_INLINE void store(T* row, int64_t half, int64_t i) const {
    if constexpr (Vectors == 0) {
      narrow(a[0], row[Interleaved ? 2 * i : i]);
      narrow(b[0], row[Interleaved ? 2 * i + 1 : half + i]);
    } else if constexpr (Interleaved) {
      store_plain_pairs<Streaming>(row + 2 * i, a[0], b[0]);
    } else if constexpr (Vectors == 2) {
      store_plain_pairs<Streaming>(row + i, a[0], a[1]);
      store_plain_pairs<Streaming>(row + half + i, b[0], b[1]);
    } else {
      store_plain<Streaming>(row + i, a[0]);
      store_plain<Streaming>(row + half + i, b[0]);
    }
  }

  template <typename Values>
  EXTROPE_INLINE void rotate(const Values& cos, const Values& sin, int64_t i) {
    for (int v = 0; v < kCount; ++v) {
      const V c = values_at<V>(cos, i + v * kLanes), s = values_at<V>(sin, i + v * kLanes);
      const V first = a[v] * c - b[v] * s, second = b[v] * c + a[v] * s;
      a[v] = first, b[v] = second;
    }
  }

  // Multiplies by scale and by weights, which have the first dims of all pairs, then the second.
  EXTROPE_INLINE void normalize(const Wide<T>* weight, int64_t half, Wide<T> scale, int64_t i) {
    for (int v = 0; v < kCount; ++v) {
      const Wide<T>* at = weight + i + v * kLanes;
      a[v] = a[v] * scale * extrope::load<V>(at);
      b[v] = b[v] * scale * extrope::load<V>(at + half);
    }
  }
};

template <int Vectors>
using Width = std::integral_constant<int, Vectors>;

// Calls visit(Width<Vectors>, i) for all pairs of a row: Half pairs, or `half` if Half is 0.
template <typename T, bool Interleaved, int64_t Half = 0, typename Visit>
EXTROPE_INLINE void for_each_pairs(int64_t half, const Visit& visit) {
  constexpr int64_t lanes = Lanes<WideVector<T>>::count;
  int64_t i = 0;
  if constexpr (Half > 0) {
    constexpr int kWidth = kInWords<T, Interleaved> ? 2 : 1;
    static_assert(Half % (kWidth * lanes) == 0);
    for (; i < Half; i += kWidth * lanes) visit(Width<kWidth>(), i);
  } else {
    if constexpr (kInWords<T, Interleaved>) {
      for (; i + 2 * lanes <= half; i += 2 * lanes) visit(Width<2>(), i);
    }
    for (; i + lanes <= half; i += lanes) visit(Width<1>(), i);
    for (; i < half; ++i) visit(Width<0>(), i);
  }
}

template <typename T>
struct Row {
  const T* in;
  T* out;
  const T* saved;
};

// Rotates a row: out = rotated in; with Grad also angle_grad += saved x out.
template <typename T, bool Interleaved, bool Grad, int64_t Half = 0, bool Streaming = false>
EXTROPE_INLINE void rotate_row(Row<T> row, int64_t half, const PairValues<T, Half>& cos,
                               const PairValues<T, Half>& sin, Wide<T>* angle_grad) {
  for_each_pairs<T, Interleaved, Half>(half, [&](auto width, int64_t i) {
    using PairVectors = Pairs<T, Interleaved, decltype(width)::value>;
    using V = typename PairVectors::V;
    PairVectors x;
    x.load(row.in, half, i);
    x.rotate(cos, sin, i);
    if constexpr (Grad) {
      PairVectors saved;
      saved.load(row.saved, half, i);
      V cross[PairVectors::kCount];
      for (int v = 0; v < PairVectors::kCount; ++v)
        cross[v] = saved.a[v] * x.b[v] - saved.b[v] * x.a[v];
      if constexpr (PairVectors::kCount == 2) {
        const auto [even, odd] = load_pairs(angle_grad + i);
        store_pairs(angle_grad + i, even + cross[0], odd + cross[1]);
      } else {
        store(angle_grad + i, load<V>(angle_grad + i) + cross[0]);
      }
    }
    x.template store<Streaming>(row.out, half, i);
  });
}

}  // namespace
}  // namespace extrope
