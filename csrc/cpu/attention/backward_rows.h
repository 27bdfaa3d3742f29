// The backward's numbers for each row of a tile, and the writes of dq, dk and dv.

#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/attention/packing.h"

namespace extrope {
namespace {

struct RowValues {
  RowValues(Workspace& space, int64_t rows)
      : lse(space.take(rows)),
        delta(space.take(rows)),
        logit_scale(space.take(rows)),
        q_scale(space.take(rows)) {}
  float *lse, *delta;  // (rows,), lse to base 2; with a softcap to base e
  float* logit_scale;  // (rows,): d logit / d <q, k>
  float* q_scale;      // (rows,): the same with log2(e), or 1 / softcap
};

// Adds in eight sums, since delta is later subtracted from numbers near to it.
inline float dot(const float* a, const float* b, int64_t count) {
  float sums[8] = {};
  for (int64_t i = 0; i < count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Computes delta = <dout, out> - dlse, and lse. A capped logit is rounded once, to base e, as lse
// is: another base would round both anew, near the cap, where they are large and nearly equal. Rows
// past the last one have a probability
// of 1 for every key, and no gradient.
template <typename T>
void load_row_values(const TileQueries& queries, const RowValues& w) {
  const AttentionParams& p = queries.p;
  const int64_t dim = p.v.head_dim;
  float out[kMaxHeadDim], dout[kMaxHeadDim];
  for (int64_t row = 0; row < queries.slices * kQueryLanes; ++row) {
    const bool valid = row < queries.count;
    w.lse[row] = w.delta[row] = 0.0f;
    w.logit_scale[row] = valid ? queries.logit_scale(row) : 0.0f;
    w.q_scale[row] = p.softcap > 0 ? w.logit_scale[row] / p.softcap : w.logit_scale[row] * kLog2E;
    if (!valid) continue;
    const int64_t at = queries.lse_index(row);
    const float lse = p.softcap > 0 ? p.lse[at] : p.lse[at] * kLog2E;
    w.lse[row] = lse == -__builtin_inff() ? 0.0f : lse;
    widen_row(static_cast<const T*>(p.out.data) + queries.offset(p.out, row), dim, out);
    widen_row(static_cast<const T*>(p.dout.data) + queries.offset(p.dout, row), dim, dout);
    const float product = dot(out, dout, dim);
    w.delta[row] = p.dlse ? product - p.dlse[at] : product;
  }
}

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
// head_dim rounded up to kWide. Each slice is summed by itself: in one chain of all rows, roundings
// do not average out where the q heads of a group have like gradients.
inline void sum_rows(const TileQueries& queries, const KeyBlock& key_block, const int32_t* seen,
                     const float* weights, const float* rows, int64_t head_dim, float* sums) {
  const int64_t wide = round_up(head_dim, kWide), padded = queries.slices * kQueryLanes;
  for (int64_t d = 0; d < wide; d += kWide) {
    for (int64_t key = 0; key < key_block.padded; key += kTallRows) {
      float* to = sums + key * wide + d;
      store_sums(Sums<kTallRows, kWideVectors>{}, to, wide);
      for (int64_t slice = 0; slice < queries.slices; ++slice) {
        if (key + kTallRows <= seen[2 * slice] || key >= seen[2 * slice + 1]) continue;
        Sums<kTallRows, kWideVectors> of_slice{};
        multiply_add(of_slice, weights + (slice * key_block.padded + key) * kQueryLanes,
                     kQueryLanes, 1, rows + d * padded + slice * kQueryLanes * kWide, kWide,
                     kQueryLanes);
        add_sums(of_slice, to, wide);
        store_sums(of_slice, to, wide);
      }
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
    float* to = static_cast<float*>(x.data) + queries.tile.batch * x.stride_batch +
                (queries.tile.first_k + key) * x.stride_seq + queries.tile.head * x.stride_head;
    const RowCosSin row_cos_sin = cos_sin_at(queries, cos_sin, queries.tile.first_k + key);
    if (row_cos_sin.cos) unrotate_row(p, sums, row_cos_sin, back);
    add_row(row_cos_sin.cos ? back : sums, x.head_dim, to);
  }
}

// Rotates a row of a region's dq back, if its queries were rotated, and adds it to that of earlier
// regions.
inline void write_dq_row(const TileQueries& queries, int64_t region, int64_t row,
                         const float* grad) {
  const AttentionParams& p = queries.p;
  float back[kMaxHeadDim];
  float* to = static_cast<float*>(p.dq.data) + queries.offset(p.dq, row);
  const int64_t token = queries.tile.first_q + queries.token(row);
  const RowCosSin cos_sin = cos_sin_at(queries, p.q_cos_sin[region], token);
  if (cos_sin.cos) unrotate_row(p, grad, cos_sin, back);
  if (cos_sin.cos) grad = back;
  if (region > 0) {
    add_row(grad, p.head_dim, to);
  } else {
    std::memcpy(to, grad, p.head_dim * sizeof(float));
  }
}

// Returns the first key that the regions from `region` on may still touch.
inline int64_t next_key(const TileQueries& queries, int64_t region) {
  return region < queries.p.regions.count ? tile_keys(queries, region).begin : kAllKeys;
}

}  // namespace
}  // namespace extrope
