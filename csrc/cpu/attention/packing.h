// Reads rows of queries and keys, rotates them if needed, and packs them as operands of products.
#pragma once

#include "cpu/attention/tile.h"
#include "cpu/simd/e4m3.h"
#include "cpu/simd/rotate_to_float.h"
#include "cpu/simd/transpose.h"

namespace extrope {
namespace {

// The cosines and sines of one token in a head; nullptr if rows are not rotated.
struct RowCosSin {
  const float *cos, *sin;
};

inline RowCosSin cos_sin_at(const TileQueries& queries, const CosSin& x, int64_t token) {
  if (!x.cos) return {nullptr, nullptr};
  const int64_t at = queries.tile.batch * x.stride_batch + token * x.stride_seq +
                     queries.tile.head * x.stride_head;
  return {x.cos + at, x.sin + at};
}

// Calls run(x) with a value of the element type of keys or values: e4m3 in a quantized cache, else
// T.
template <typename T, typename Run>
inline void with_element_type(const AttentionTensor& x, const Run& run) {
  if (x.is_e4m3) return run(e4m3{});
  run(T{});
}

// Calls run(x) with a value of out's element type, T or float.
template <typename T, typename Run>
inline void with_out_type(const AttentionParams& p, const Run& run) {
  if (p.float32_out) return run(float{});
  run(T{});
}

// Loads a row. A rotated row is rounded to its type, like a rotated tensor; one in e4m3 stays in
// float.
template <typename T>
inline void read_row(const AttentionParams& p, const T* from, int64_t dim, RowCosSin cos_sin,
                     float* to) {
  if (!cos_sin.cos) return widen_row(from, dim, to);
  rotate_to_float(p.rotation, from, cos_sin.cos, cos_sin.sin, 1.0f, to);
  if constexpr (sizeof(T) == 2) {
    T rounded[kMaxHeadDim];
    narrow_row(to, dim, rounded);
    widen_row(rounded, dim, to);
  }
}

// Rotates a row of gradients back.
inline void unrotate_row(const AttentionParams& p, const float* from, RowCosSin cos_sin,
                         float* to) {
  rotate_to_float(p.rotation, from, cos_sin.cos, cos_sin.sin, -1.0f, to);
}

// Keys of one sequence and head: `count` from key `first` on, packed as `padded` rows. Rows past
// the last key are zero.
struct KeyBlock {
  int64_t first, count, padded;
};

inline int64_t key_offset(const TileQueries& queries, const AttentionTensor& x, int64_t key) {
  return queries.tile.batch * x.stride_batch + x.at(queries.tile.first_k + key) +
         queries.tile.head * x.stride_head;
}

template <typename T>
inline const T* key_row(const TileQueries& queries, const AttentionTensor& x, int64_t key) {
  return static_cast<const T*>(x.data) + key_offset(queries, x, key);
}

// Packs (padded, head_dim), each row rotated if cos_sin is.
template <typename T>
inline void pack_rows(const TileQueries& queries, const AttentionTensor& x, const CosSin& cos_sin,
                      const KeyBlock& key_block, float* to) {
  const int64_t dim = x.head_dim;
  for (int64_t i = 0; i < key_block.count; ++i) {
    const int64_t key = key_block.first + i;
    read_row(queries.p, key_row<T>(queries, x, key), dim,
             cos_sin_at(queries, cos_sin, queries.tile.first_k + key), to + i * dim);
  }
  std::memset(to + key_block.count * dim, 0,
              (key_block.padded - key_block.count) * dim * sizeof(float));
}

// Prefetches one slice's share, out of `slices`, of the keys first..first+count-1, while the slice
// works on earlier keys. The rows of one head are too short and too far apart for the processor to
// predict the next ones.
template <typename T>
inline void prefetch_share(const TileQueries& queries, const AttentionTensor& x, int64_t first,
                           int64_t count, int64_t slice) {
  const int64_t element = x.is_e4m3 ? 1 : sizeof(T);
  const int64_t begin = count * slice / queries.slices, end = count * (slice + 1) / queries.slices;
  for (int64_t i = begin; i < end; ++i) {
    const char* from =
        static_cast<const char*>(x.data) + key_offset(queries, x, first + i) * element;
    const int64_t bytes = x.head_dim * element;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// Packs (padded, head_dim) as the left factor of a product over keys: (head_dim / Dims, padded,
// Dims). Writes one cache line at a time, since lines of different d fall into the same set of the
// cache.
template <int Dims>
inline void pack_columns(const float* rows, int64_t dim, int64_t padded, float* to) {
  constexpr int64_t kLineFloats = 16, kLineKeys = kLineFloats / Dims;
  static_assert(kLineKeys > 0 && kLineFloats % Dims == 0, "a cache line holds whole keys");
  for (int64_t i = 0; i < padded; i += kLineKeys) {
    for (int64_t d = 0; d < dim; d += Dims) {
      float* line = to + d * padded + i * Dims;
#pragma GCC unroll 16
      for (int64_t key = 0; key < kLineKeys; ++key) {
        std::memcpy(line + key * Dims, rows + (i + key) * dim + d, Dims * sizeof(float));
      }
    }
  }
}

template <typename T>
inline void read_query(const TileQueries& queries, const AttentionTensor& x, const CosSin& cos_sin,
                       int64_t token, int64_t head, float* to) {
  const T* from = static_cast<const T*>(x.data) + queries.offset(x, token, head);
  read_row(queries.p, from, x.head_dim, cos_sin_at(queries, cos_sin, queries.tile.first_q + token),
           to);
}

// A row per element of a vector.
using RowBuffer = float[kFloats][kMaxHeadDim + kFloats];

// Packs (slices, head_dim, kQueryLanes); rows past the last one are zero.
template <typename T>
inline void pack_slices(const TileQueries& queries, const AttentionTensor& x, const CosSin& cos_sin,
                        const float* scale, float* to) {
  const int64_t dim = x.head_dim;
  RowBuffer rows = {};
  for (int64_t first = 0; first < queries.slices * kQueryLanes; first += kFloats) {
    if (first + kFloats > queries.count) std::memset(rows, 0, sizeof(rows));
    queries.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      read_query<T>(queries, x, cos_sin, token, head, rows[i]);
    });
    float* columns = to + first / kQueryLanes * dim * kQueryLanes + first % kQueryLanes;
    const floats factor = load<floats>(scale + first);
    for (int64_t d = 0; d < dim; d += kFloats) {
      words square[kFloats];
      for (int64_t i = 0; i < kFloats; ++i) square[i] = load<words>(rows[i] + d);
      transpose(square);
      for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
        store(columns + (d + i) * kQueryLanes, bits_as<floats>(square[i]) * factor);
      }
    }
  }
}

// Reads the rows from `first` on out of pack_slices' layout.
inline void unpack_rows(const float* from, int64_t first, int64_t dim, const float* scale,
                        RowBuffer& rows) {
  const float* columns = from + first / kQueryLanes * dim * kQueryLanes + first % kQueryLanes;
  const floats factor = load<floats>(scale + first);
  for (int64_t d = 0; d < dim; d += kFloats) {
    words square[kFloats] = {};
    for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
      square[i] = bits_as<words>(load<floats>(columns + (d + i) * kQueryLanes) * factor);
    }
    transpose(square);
    for (int64_t i = 0; i < kFloats; ++i) store(rows[i] + d, square[i]);
  }
}

}  // namespace
}  // namespace extrope
