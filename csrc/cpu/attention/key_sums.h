// The products of the backward that sum over rows, for a block of keys in dk and dv.

#pragma once

#include "cpu/attention/packing.h"

namespace extrope {
namespace {

// Packs (head_dim / kWide, rows, kWide); columns past head_dim and rows past the last are zero.
template <typename T>
void pack_wide(const TileQueries& queries, const AttentionTensor& x, const CosSin& cos_sin,
               const float* scale, float* to) {
  const int64_t dim = x.head_dim, padded = queries.slices * kQueryLanes;
  float values[kMaxHeadDim + kWide] = {};
  for (int64_t row = 0; row < padded; ++row) {
    const bool valid = row < queries.count;
    if (valid) read_query<T>(queries, x, cos_sin, queries.token(row), queries.head(row), values);
    for (int64_t d = 0; d < dim; d += kWide) {
      float* piece = to + d * padded + row * kWide;
      for (int64_t i = 0; i < kWide; ++i) piece[i] = valid ? values[d + i] * scale[row] : 0.0f;
    }
  }
}

// sums[key] = sum over rows of weights[key][row] * rows[row]: (key_block.padded, wide); wide is
// head_dim rounded up to kWide.
inline void sum_rows(const TileQueries& queries, const KeyBlock& key_block, const int32_t* seen,
                     const float* weights, const float* rows, int64_t head_dim, float* sums) {
  const int64_t wide = round_up(head_dim, kWide), padded = queries.slices * kQueryLanes;
  for (int64_t d = 0; d < wide; d += kWide) {
    for (int64_t key = 0; key < key_block.padded; key += kTallRows) {
      Sums<kTallRows, kWideVectors> acc{};
      for (int64_t slice = 0; slice < queries.slices; ++slice) {
        if (key + kTallRows <= seen[2 * slice] || key >= seen[2 * slice + 1]) continue;
        multiply_add(acc, weights + (slice * key_block.padded + key) * kQueryLanes, kQueryLanes, 1,
                     rows + d * padded + slice * kQueryLanes * kWide, kWide, kQueryLanes);
      }
      store_sums(acc, sums + key * wide + d, wide);
    }
  }
}

inline void add_row(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    store(to + i, load<floats>(to + i) + load<floats>(from + i));
  }
  for (; i < count; ++i) to[i] += from[i];
}

// Adds the result of sum_rows to the rows of dk or dv, rotated back if the keys were rotated.
inline void add_keys(const TileQueries& queries, const KeyBlock& key_block, const CosSin& cos_sin,
                     const float* sums, const AttentionTensor& x) {
  const AttentionParams& p = queries.p;
  const int64_t wide = round_up(x.head_dim, kWide);
  float back[kMaxHeadDim];
  for (int64_t i = 0; i < key_block.count; ++i, sums += wide) {
    const int64_t key = key_block.first + i;
    float* to = static_cast<float*>(x.data) + queries.tile.batch * x.batch +
                (queries.tile.first_k + key) * x.seq + queries.tile.head * x.head;
    const RowCosSin row_cos_sin = cos_sin_at(queries, cos_sin, queries.tile.first_k + key);
    if (row_cos_sin.cos) unrotate_row(p, sums, row_cos_sin, back);
    add_row(row_cos_sin.cos ? back : sums, x.head_dim, to);
  }
}

}  // namespace
}  // namespace extrope
