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

inline RowCosSin cos_sin_at(const BlockRows& block, const CosSin& x, int64_t token) {
  if (!x.cos) return {nullptr, nullptr};
  const int64_t at = block.tile.batch * x.batch + token * x.seq + block.tile.head * x.head;
  return {x.cos + at, x.sin + at};
}

// Calls run(x) with a value of the element type of keys or values: e4m3, else T.
template <typename T, typename Run>
inline void with_rows(const AttentionTensor& x, const Run& run) {
  if (x.is_e4m3) return run(e4m3{});
  run(T{});
}

// Calls run(x) with a value of out's element type, T or float.
template <typename T, typename Run>
inline void with_out(const AttentionParams& p, const Run& run) {
  if (p.float32_out) return run(float{});
  run(T{});
}

// Loads a row. A rotated row is rounded to its type, like a rotated tensor; one in e4m3 stays in
// float.
template <typename T>
inline void read_row(const AttentionParams& p, const T* from, int64_t dim, RowCosSin cos_sin,
                     float* to) {
  if (!cos_sin.cos) return widen_row(from, dim, to);
  rotate_to_float({dim, p.half, p.interleaved}, from, cos_sin.cos, cos_sin.sin, 1.0f, to);
  if constexpr (sizeof(T) == 2) {
    T rounded[kMaxHeadDim];
    narrow_row(to, dim, rounded);
    widen_row(rounded, dim, to);
  }
}

// Rotates a row of gradients back.
inline void unrotate_row(const AttentionParams& p, const float* from, RowCosSin cos_sin,
                         float* to) {
  rotate_to_float({p.head_dim, p.half, p.interleaved}, from, cos_sin.cos, cos_sin.sin, -1.0f, to);
}

// Some keys of a head of k or v; rows past the last one are zero.
struct KeyBlock {
  int64_t first, count, padded;
};

inline int64_t key_offset(const BlockRows& block, const AttentionTensor& x, int64_t key) {
  return block.tile.batch * x.batch + x.at(block.tile.first_k + key) + block.tile.head * x.head;
}

template <typename T>
inline const T* key_row(const BlockRows& block, const AttentionTensor& x, int64_t key) {
  return static_cast<const T*>(x.data) + key_offset(block, x, key);
}

// Packs (padded, head_dim).
template <typename T>
inline void pack_rows(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
                      const KeyBlock& key_block, float* to) {
  const int64_t dim = x.head_dim;
  for (int64_t i = 0; i < key_block.count; ++i) {
    const int64_t key = key_block.first + i;
    read_row(block.p, key_row<T>(block, x, key), dim,
             cos_sin_at(block, cos_sin, block.tile.first_k + key), to + i * dim);
  }
  std::memset(to + key_block.count * dim, 0,
              (key_block.padded - key_block.count) * dim * sizeof(float));
}

// Prefetches one slice's share, out of `slices`, of the keys first..first+count-1, while the slice
// works on earlier keys. The rows of one head are too short and too far apart for the processor to
// predict the next ones.
template <typename T>
inline void prefetch_share(const BlockRows& block, const AttentionTensor& x, int64_t first,
                           int64_t count, int64_t slice) {
  const int64_t element = x.is_e4m3 ? 1 : sizeof(T);
  const int64_t begin = count * slice / block.slices, end = count * (slice + 1) / block.slices;
  for (int64_t i = begin; i < end; ++i) {
    const char* from = static_cast<const char*>(x.data) + key_offset(block, x, first + i) * element;
    const int64_t bytes = x.head_dim * element;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// Packs the transposed matrix as the left factor of a product: (head_dim / kRows, padded, kRows).
// Writes one cache line at a time, since lines of different d fall into the same set of the cache.
inline void pack_columns(const float* rows, int64_t dim, int64_t padded, float* to) {
  constexpr int64_t kLine = 16 / kRows;  // keys
  for (int64_t i = 0; i < padded; i += kLine) {
    for (int64_t d = 0; d < dim; d += kRows) {
      float* line = to + d * padded + i * kRows;
#pragma GCC unroll 16
      for (int64_t key = 0; key < kLine; ++key) {
        std::memcpy(line + key * kRows, rows + (i + key) * dim + d, kRows * sizeof(float));
      }
    }
  }
}

template <typename T>
inline void read_query(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
                       int64_t token, int64_t head, float* to) {
  const T* from = static_cast<const T*>(x.data) + block.offset(x, token, head);
  read_row(block.p, from, x.head_dim, cos_sin_at(block, cos_sin, block.tile.first_q + token), to);
}

// A row per element of a vector.
using RowBuffer = float[kFloats][kMaxHeadDim + kFloats];

// Packs (slices, head_dim, kSlice); rows past the last one are zero.
template <typename T>
inline void pack_slices(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
                        const float* scale, float* to) {
  const int64_t dim = x.head_dim;
  RowBuffer rows = {};
  for (int64_t first = 0; first < block.slices * kSlice; first += kFloats) {
    if (first + kFloats > block.count) std::memset(rows, 0, sizeof(rows));
    block.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      read_query<T>(block, x, cos_sin, token, head, rows[i]);
    });
    float* columns = to + first / kSlice * dim * kSlice + first % kSlice;
    const floats factor = load<floats>(scale + first);
    for (int64_t d = 0; d < dim; d += kFloats) {
      words square[kFloats];
      for (int64_t i = 0; i < kFloats; ++i) square[i] = load<words>(rows[i] + d);
      transpose(square);
      for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
        store(columns + (d + i) * kSlice, bits_as<floats>(square[i]) * factor);
      }
    }
  }
}

// Reads the rows from `first` on out of pack_slices' layout.
inline void unpack_rows(const float* from, int64_t first, int64_t dim, const float* scale,
                        RowBuffer& rows) {
  const float* columns = from + first / kSlice * dim * kSlice + first % kSlice;
  const floats factor = load<floats>(scale + first);
  for (int64_t d = 0; d < dim; d += kFloats) {
    words square[kFloats] = {};
    for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
      square[i] = bits_as<words>(load<floats>(columns + (d + i) * kSlice) * factor);
    }
    transpose(square);
    for (int64_t i = 0; i < kFloats; ++i) store(rows[i] + d, square[i]);
  }
}

}  // namespace
}  // namespace extrope
