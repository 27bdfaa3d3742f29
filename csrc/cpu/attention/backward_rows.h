// The backward's numbers for each row of a tile, and the writes of rows' gradients.

#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/attention/key_sums.h"

namespace extrope {
namespace {

struct RowValues {
  RowValues(Workspace& space, int64_t rows)
      : lse(space.take(rows)),
        delta(space.take(rows)),
        logit_scale(space.take(rows)),
        q_scale(space.take(rows)) {}
  float *lse, *delta;  // (rows,), lse to base 2
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

// Computes delta = <dout, out> - dlse, and lse to base 2. Rows past the last one have a probability
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
    const float lse = p.lse[at] * kLog2E;
    w.lse[row] = lse == -__builtin_inff() ? 0.0f : lse;
    widen_row(static_cast<const T*>(p.out.data) + queries.offset(p.out, row), dim, out);
    widen_row(static_cast<const T*>(p.dout.data) + queries.offset(p.dout, row), dim, dout);
    const float product = dot(out, dout, dim);
    w.delta[row] = p.dlse ? product - p.dlse[at] : product;
  }
}

// Rotates a row of a region's dq back and adds it to that of earlier regions.
inline void write_dq_row(const TileQueries& queries, int64_t region, int64_t row,
                         const float* grad) {
  const AttentionParams& p = queries.p;
  float back[kMaxHeadDim];
  float* to = static_cast<float*>(p.dq.data) + queries.offset(p.dq, row);
  const int64_t token = queries.tile.first_q + queries.token(row);
  unrotate_row(p, grad, cos_sin_at(queries, p.q_cos_sin[region], token), back);
  if (region > 0) {
    add_row(back, p.head_dim, to);
  } else {
    std::memcpy(to, back, p.head_dim * sizeof(float));
  }
}

// Returns the first key that the regions from `region` on may still touch.
inline int64_t next_key(const TileQueries& queries, int64_t region) {
  return region < queries.p.regions.count ? tile_keys(queries, region).begin : kAllKeys;
}

}  // namespace
}  // namespace extrope
