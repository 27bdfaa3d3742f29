// The products of the backward that sum over lanes: what a step of keys adds to dk and dv.
#pragma once

#include "cpu/attention/tile.h"

namespace extrope {
namespace {

// (head_dim / kWide, lanes, kWide), columns past head_dim and lanes past the last one zero.
template <typename T>
void pack_wide(const TileLanes& lanes, const AttentionTensor& x, const AttentionTurn& turn,
               const float* scale, float* to) {
  const int64_t dim = lanes.p.head_dim, padded = lanes.panels * kPanel;
  float row[kMaxHeadDim + kWide] = {};
  for (int64_t lane = 0; lane < padded; ++lane) {
    const bool real = lane < lanes.count;
    if (real) read_lane<T>(lanes, x, turn, lanes.row(lane), lanes.head(lane), row);
    for (int64_t d = 0; d < dim; d += kWide) {
      float* piece = to + d * padded + lane * kWide;
      for (int64_t i = 0; i < kWide; ++i) piece[i] = real ? row[d + i] * scale[lane] : 0.0f;
    }
  }
}

// sums[key] = sum over lanes of weights[key][lane] * rows[lane]: (step.padded, wide).
void sum_lanes(const TileLanes& lanes, const KeyStep& step, const int32_t* seen,
               const float* weights, const float* rows, float* sums) {
  const int64_t wide = round_up(lanes.p.head_dim, kWide), padded = lanes.panels * kPanel;
  for (int64_t d = 0; d < wide; d += kWide) {
    for (int64_t key = 0; key < step.padded; key += kTallRows) {
      Sums<kTallRows, kWideVectors> block{};
      for (int64_t panel = 0; panel < lanes.panels; ++panel) {
        if (key + kTallRows <= seen[2 * panel] || key >= seen[2 * panel + 1]) continue;
        multiply_add(block, weights + (panel * step.padded + key) * kPanel, kPanel, 1,
                     rows + d * padded + panel * kPanel * kWide, kWide, kPanel);
      }
      store_sums(block, sums + key * wide + d, wide);
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

// Adds what sum_lanes found to the rows of dk or dv, turned back where the keys were turned.
void add_keys(const TileLanes& lanes, const KeyStep& step, const AttentionTurn& turn,
              const float* sums, const AttentionTensor& x) {
  const AttentionParams& p = lanes.p;
  const int64_t wide = round_up(p.head_dim, kWide);
  float back[kMaxHeadDim];
  for (int64_t i = 0; i < step.count; ++i, sums += wide) {
    const int64_t key = step.first + i;
    float* to = static_cast<float*>(x.data) + lanes.tile.batch * x.batch +
                (lanes.tile.token_k + key) * x.seq + lanes.tile.head * x.head;
    const float* by = turn_at(turn, lanes.tile.batch, lanes.tile.token_k + key);
    if (by) turn_row({p.head_dim, p.half, p.interleaved}, sums, by, by + p.half, -1.0f, back);
    add_row(by ? back : sums, p.head_dim, to);
  }
}

}  // namespace
}  // namespace extrope
