// Forward of the attention over regions on the CPU. Compiled once for each instruction set, with
// EXTROPE_ISA as its name.
//
// A tile of query rows walks the keys in steps and keeps a running maximum and sum. Every panel of
// lanes cuts its own keys out of a step, so masks are met only in the few blocks of kRows keys in
// which the lanes of one panel disagree.

#include "cpu/attention/blocks.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

constexpr int64_t kTileLanes = 768, kStepKeys = 128;
// The running maximum starts here rather than at -inf, so that differences are never NaN.
constexpr float kLowest = -1e30f;

struct Forward {
  Forward(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t lanes = round_up(plan.rows * (p.heads_q / p.heads_k), kPanel);
    q = space.take(p.regions * lanes * p.head_dim);
    out = space.take(lanes * p.head_dim);
    keys = space.take(p.regions * plan.keys * p.head_dim);
    values = space.take(plan.keys * p.head_dim);
    scores = space.take(plan.keys * kPanel);
    maximum = space.take(lanes);
    sum = space.take(lanes);
    scale = space.take(lanes);
  }
  Workspace space;
  float* q;                      // (regions, panels, head_dim, kPanel)
  float* out;                    // (panels, head_dim, kPanel)
  float* keys;                   // (regions, keys, head_dim)
  float* values;                 // (head_dim / kRows, keys, kRows)
  float* scores;                 // (keys, kPanel)
  float *maximum, *sum, *scale;  // (lanes,)
};

// A panel at work on the keys of a step in one region.
struct PanelView {
  const float *q, *keys;
  int64_t dim, first;  // the step's first key
};

// The scores of blocks that every lane of a panel sees, or of blocks it shares with other regions.
template <bool Shared>
EXTROPE_INLINE void score_blocks(const Forward& w, const PanelView& v, int64_t begin, int64_t end,
                                 const LaneKeys& visible, int64_t written,
                                 floats (&maximum)[kPanelVectors]) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kPanelVectors> sums{};
    float* scores = w.scores + key * kPanel;
    multiply_add(sums, v.keys + key * v.dim, v.dim, 1, v.q, kPanel, v.dim);
    if constexpr (Shared) merge_block(sums, visible, v.first + key, key >= written, scores);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVectors; ++j) maximum[j] = larger(maximum[j], sums.at[i][j]);
    }
    store_sums(sums, scores, kPanel);
  }
}

// The scores of a panel in one region, after those of the regions before it, which have written
// those of the keys below `written`.
void score_region(const TileLanes& lanes, const Forward& w, const PanelView& v, int64_t panel,
                  int64_t region, const PanelBlocks& b, int64_t written,
                  floats (&maximum)[kPanelVectors]) {
  LaneKeys visible;
  if (b.has_shared()) visible = lane_keys(lanes, panel, region);
  const int64_t shared[2][2] = {{b.begin, b.full_begin}, {b.full_end, b.end}};
  for (const auto& [begin, end] : shared) {
    score_blocks<true>(w, v, begin, end, visible, written, maximum);
  }
  score_blocks<false>(w, v, b.full_begin, b.full_end, visible, written, maximum);
}

// Scores to probabilities; returns by which factor the earlier sums have shrunk.
EXTROPE_INLINE void soften(const Forward& w, int64_t panel, const WalkBlocks& blocks,
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

void visit_panel(const TileLanes& lanes, const TilePlan& plan, const Forward& w, int64_t panel,
                 const KeyStep& step) {
  const WalkBlocks blocks(lanes, panel, step);
  if (blocks.begin >= blocks.end) return;
  const int64_t dim = lanes.p.head_dim;
  floats maximum[kPanelVectors], shrink[kPanelVectors];
  for (int j = 0; j < kPanelVectors; ++j) {
    maximum[j] = load<floats>(w.maximum + panel * kPanel + j * kFloats);
  }
  for (int64_t r = 0, written = 0; r < lanes.p.regions; ++r) {
    const PanelBlocks& b = blocks.of[r];
    if (b.begin >= b.end) continue;
    const PanelView v{w.q + (r * lanes.panels + panel) * dim * kPanel, w.keys + r * plan.keys * dim,
                      dim, step.first};
    score_region(lanes, w, v, panel, r, b, written, maximum);
    written = b.end;
  }
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
  finish_sums(lanes, w.maximum, w.sum, w.scale);
  LaneRows rows;
  for (int64_t first = 0; first < lanes.count; first += kFloats) {
    unpack_lanes(w.out, first, lanes.p.head_dim, w.scale, rows);
    lanes.each_of_vector(first, [&](int64_t i, int64_t row, int64_t head) {
      narrow_row(rows[i], lanes.p.head_dim,
                 static_cast<T*>(lanes.p.out.data) + lanes.offset(lanes.p.out, row, head));
    });
  }
}

template <typename T>
void forward(const TileLanes& lanes, const TilePlan& plan, const Forward& w) {
  const AttentionParams& p = lanes.p;
  const int64_t padded = lanes.panels * kPanel;
  std::memset(w.out, 0, padded * p.head_dim * sizeof(float));
  std::memset(w.sum, 0, padded * sizeof(float));
  for (int64_t lane = 0; lane < padded; ++lane) {
    w.maximum[lane] = kLowest;
    w.scale[lane] = lane < lanes.count ? lanes.scale(lane) * kLog2E : 0.0f;
  }
  const TileWalk walk(lanes);
  for (int64_t r = 0; r < p.regions; ++r) {
    if (!walk.sees(r)) continue;
    pack_panels<T>(lanes, p.q[r], p.q_turn[r], w.scale, w.q + r * padded * p.head_dim);
  }
  for (int64_t first = walk.first; first < walk.last; first += plan.keys) {
    const KeyStep step = walk.step(first, plan.keys);
    pack_rows<T>(lanes, p.v, {}, step, w.keys);
    pack_columns(w.keys, p.head_dim, step.padded, w.values);
    for (int64_t r = 0; r < p.regions; ++r) {
      pack_part(walk, r, step, [&](const KeyStep& part, int64_t offset) {
        pack_rows<T>(lanes, p.k[r], p.k_turn[r], part,
                     w.keys + (r * plan.keys + offset) * p.head_dim);
      });
    }
    for (int64_t panel = 0; panel < lanes.panels; ++panel) {
      prefetch_step<T>(lanes, walk, first + plan.keys, plan.keys, panel);
      visit_panel(lanes, plan, w, panel, step);
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
