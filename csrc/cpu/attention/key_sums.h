// The products of the backward that sum over rows, for a block of keys in dk and dv.

#pragma once

#include "cpu/attention/packing.h"

namespace extrope {
namespace {

// Packs (head_dim / kWide, block, kWide); columns past head_dim and rows past the last are zero.
template <typename T>
void pack_wide(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
               const float* scale, float* to) {
  const int64_t dim = x.head_dim, padded = block.slices * kSlice;
  float values[kMaxHeadDim + kWide] = {};
  for (int64_t row = 0; row < padded; ++row) {
    const bool real = row < block.count;
    if (real) read_query<T>(block, x, cos_sin, block.token(row), block.head(row), values);
    for (int64_t d = 0; d < dim; d += kWide) {
      float* piece = to + d * padded + row * kWide;
      for (int64_t i = 0; i < kWide; ++i) piece[i] = real ? values[d + i] * scale[row] : 0.0f;
    }
  }
}

// sums[key] = sum over rows of weights[key][row] * rows[row]: (key_block.padded, wide); wide is
// head_dim rounded up to kWide.
inline void sum_rows(const BlockRows& block, const KeyBlock& key_block, const int32_t* seen,
                     const float* weights, const float* rows, int64_t head_dim, float* sums) {
  const int64_t wide = round_up(head_dim, kWide), padded = block.slices * kSlice;
  for (int64_t d = 0; d < wide; d += kWide) {
    for (int64_t key = 0; key < key_block.padded; key += kTallRows) {
      Sums<kTallRows, kWideVectors> found{};
      for (int64_t slice = 0; slice < block.slices; ++slice) {
        if (key + kTallRows <= seen[2 * slice] || key >= seen[2 * slice + 1]) continue;
        multiply_add(found, weights + (slice * key_block.padded + key) * kSlice, kSlice, 1,
                     rows + d * padded + slice * kSlice * kWide, kWide, kSlice);
      }
      store_sums(found, sums + key * wide + d, wide);
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
inline void add_keys(const BlockRows& block, const KeyBlock& key_block, const CosSin& cos_sin,
                     const float* sums, const AttentionTensor& x) {
  const AttentionParams& p = block.p;
  const int64_t wide = round_up(x.head_dim, kWide);
  float back[kMaxHeadDim];
  for (int64_t i = 0; i < key_block.count; ++i, sums += wide) {
    const int64_t key = key_block.first + i;
    float* to = static_cast<float*>(x.data) + block.tile.batch * x.batch +
                (block.tile.first_k + key) * x.seq + block.tile.head * x.head;
    const RowCosSin row_cos_sin = cos_sin_at(block, cos_sin, block.tile.first_k + key);
    if (row_cos_sin.cos) unrotate_row(p, sums, row_cos_sin, back);
    add_row(row_cos_sin.cos ? back : sums, x.head_dim, to);
  }
}

}  // namespace
}  // namespace extrope
