// Forward of the attention over regions on the CPU. Compiled once for each instruction set, with
// EXTROPE_ISA as its name.
//
// A tile of query rows walks the keys of each region in steps and keeps a running maximum and sum.
// Every panel of lanes cuts its own keys out of a step, so masks are met only in the few blocks of
// kRows keys in which the lanes of one panel disagree.

#include "attention.h"
#include "attention_tile.h"
#include "exp2.h"

#define EXTROPE_JOIN(a, b) a##b
#define EXTROPE_EXPAND(a, b) EXTROPE_JOIN(a, b)

namespace extrope {
namespace {

constexpr int64_t kTileLanes = 768, kStepKeys = 128;
// The running maximum starts here rather than at -inf, so that differences are never NaN.
constexpr float kLowest = -1e30f;

struct Forward {
  Forward(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t lanes = round_up(plan.rows * (p.heads_q / p.heads_k), kPanel);
    q = space.take(lanes * p.head_dim);
    out = space.take(lanes * p.head_dim);
    keys = space.take(plan.keys * p.head_dim);
    values = space.take(plan.keys * p.head_dim);
    scores = space.take(plan.keys * kPanel);
    maximum = space.take(lanes);
    sum = space.take(lanes);
    scale = space.take(lanes);
  }
  Workspace space;
  float *q, *out;  // (panels, head_dim, kPanel)
  float *keys, *values;
  float* scores;                 // (keys, kPanel)
  float *maximum, *sum, *scale;  // (lanes,)
};

template <bool Masked>
EXTROPE_INLINE void score_blocks(const Forward& w, const float* q, int64_t dim, int64_t begin,
                                 int64_t end, const LaneKeys& visible, int64_t first,
                                 floats (&maximum)[kPanelVectors]) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kPanelVectors> sums{};
    multiply_add(sums, w.keys + key * dim, dim, 1, q, kPanel, dim);
    if constexpr (Masked) mask_block(sums, visible, first + key);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVectors; ++j) maximum[j] = larger(maximum[j], sums.at[i][j]);
    }
    store_sums(sums, w.scores + key * kPanel, kPanel);
  }
}

// Scores to probabilities; returns by which factor the earlier sums have shrunk.
EXTROPE_INLINE void soften(const Forward& w, int64_t panel, const PanelBlocks& blocks,
                           const floats (&maximum)[kPanelVectors],
                           floats (&shrink)[kPanelVectors]) {
  floats sum[kPanelVectors];
  for (int j = 0; j < kPanelVectors; ++j) {
    const int64_t at = panel * kPanel + j * kFloats;
    shrink[j] = exp2_vector(load<floats>(w.maximum + at) - maximum[j]);
    sum[j] = load<floats>(w.sum + at) * shrink[j];
    store(w.maximum + at, maximum[j]);
  }
  for (int64_t key = blocks.begin; key < blocks.end; ++key) {
    float* row = w.scores + key * kPanel;
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVectors; ++j) {
      const floats e = exp2_vector(load<floats>(row + j * kFloats) - maximum[j]);
      store(row + j * kFloats, e);
      sum[j] += e;
    }
  }
  for (int j = 0; j < kPanelVectors; ++j) store(w.sum + panel * kPanel + j * kFloats, sum[j]);
}

void visit_panel(const TileLanes& lanes, const Forward& w, int64_t panel, int64_t region,
                 const KeyStep& step) {
  const PanelBlocks blocks = panel_blocks(panel_keys(lanes, panel, region), step.first, step.count);
  if (blocks.begin >= blocks.end) return;
  const int64_t dim = lanes.p.head_dim;
  const float* q = w.q + panel * dim * kPanel;
  floats maximum[kPanelVectors], shrink[kPanelVectors];
  for (int j = 0; j < kPanelVectors; ++j) {
    maximum[j] = load<floats>(w.maximum + panel * kPanel + j * kFloats);
  }
  LaneKeys visible;
  if (blocks.full_begin > blocks.begin || blocks.end > blocks.full_end) {
    visible = lane_keys(lanes, panel, region);
  }
  score_blocks<true>(w, q, dim, blocks.begin, blocks.full_begin, visible, step.first, maximum);
  score_blocks<false>(w, q, dim, blocks.full_begin, blocks.full_end, visible, step.first, maximum);
  score_blocks<true>(w, q, dim, blocks.full_end, blocks.end, visible, step.first, maximum);
  soften(w, panel, blocks, maximum, shrink);
  for (int64_t d = 0; d < dim; d += kRows) {
    float* out = w.out + (panel * dim + d) * kPanel;
    Sums<kRows, kPanelVectors> sums;
    load_sums(sums, out, kPanel);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVectors; ++j) sums.at[i][j] *= shrink[j];
    }
    multiply_add(sums, w.values + d * step.padded + blocks.begin * kRows, 1, kRows,
                 w.scores + blocks.begin * kPanel, kPanel, blocks.end - blocks.begin);
    store_sums(sums, out, kPanel);
  }
}

// Divides by the sums of probabilities and writes out and lse.
template <typename T>
void finish(const TileLanes& lanes, const Forward& w) {
  float row[kMaxHeadDim];
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    const float sum = w.sum[lane];
    lanes.p.lse[lanes.statistic(lane)] =
        sum == 0.0f ? -__builtin_inff() : w.maximum[lane] * kLn2 + __builtin_logf(sum);
    unpack_lane(w.out, lane, lanes.p.head_dim, sum == 0.0f ? 0.0f : 1.0f / sum, row);
    narrow_row(row, lanes.p.head_dim,
               static_cast<T*>(lanes.p.out.data) + lanes.offset(lanes.p.out, lane));
  }
}

template <typename T>
void forward(const TileLanes& lanes, const TilePlan& plan, const Forward& w) {
  const AttentionParams& p = lanes.p;
  const int64_t padded = lanes.panels * kPanel;
  std::memset(w.out, 0, padded * p.head_dim * sizeof(float));
  std::memset(w.sum, 0, padded * sizeof(float));
  for (int64_t lane = 0; lane < padded; ++lane) w.maximum[lane] = kLowest;
  for (int64_t lane = 0; lane < lanes.count; ++lane) w.scale[lane] = lanes.scale(lane) * kLog2E;
  for (int64_t region = 0; region < p.regions; ++region) {
    const PanelKeys keys = tile_keys(lanes, region);
    if (keys.first >= keys.last) continue;
    pack_panels<T>(lanes, p.q[region], p.q_turn[region], w.scale, w.q);
    for (int64_t first = keys.first; first < keys.last; first += plan.keys) {
      const int64_t count = smaller(plan.keys, keys.last - first);
      const KeyStep step{first, count, round_up(count, kRows)};
      pack_rows<T>(lanes, p.v, {}, step, w.keys);
      pack_columns(w.keys, p.head_dim, step.padded, w.values);
      pack_rows<T>(lanes, p.k[region], p.k_turn[region], step, w.keys);
      const int64_t next = first + count, next_count = smaller(plan.keys, keys.last - next);
      for (int64_t panel = 0; panel < lanes.panels; ++panel) {
        prefetch_share<T>(lanes, p.k[region], next, next_count, panel);
        prefetch_share<T>(lanes, p.v, next, next_count, panel);
        visit_panel(lanes, w, panel, region, step);
      }
    }
  }
  finish<T>(lanes, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  plan.rows = tile_rows(p, kTileLanes);
  plan.keys = smaller(kStepKeys, round_up(greater(p.seqlen_k, 1), kRows));
  plan.workspace = Forward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  const TileLanes lanes{p, tile};
  const Forward w(p, plan, workspace);
  switch (p.dtype) {
    case DType::bf16:
      return forward<bf16>(lanes, plan, w);
    case DType::f16:
      return forward<f16>(lanes, plan, w);
    default:
      return forward<float>(lanes, plan, w);
  }
}

}  // namespace extrope
