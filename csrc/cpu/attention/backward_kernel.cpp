// Backward of the attention over regions on the CPU. Compiled once for each instruction set, with
// EXTROPE_ISA as its name.
//
// A tile of query rows walks the keys of each region in steps: scores and their gradients are made
// once, and serve dq (kept by the tile) as well as dk and dv (in memory, where tiles add in turn).

#include <numeric>

#include "cpu/attention/kernels.h"
#include "cpu/attention/key_sums.h"
#include "cpu/attention/tile.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

constexpr int64_t kTileFloats = 36864;  // of lanes times head_dim
constexpr int64_t kMaxTileLanes = 384, kStepKeys = 96;
constexpr int64_t kKeyBlock = std::lcm(kRows, kTallRows);

struct Backward {
  Backward(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t lanes = round_up(plan.rows * (p.heads_q / p.heads_k), kPanel);
    const int64_t wide = round_up(p.head_dim, kWide);
    q = space.take(lanes * p.head_dim);
    dout = space.take(lanes * p.head_dim);
    dq = space.take(lanes * p.head_dim);
    q_rows = space.take(lanes * wide);
    dout_rows = space.take(lanes * wide);
    keys = space.take(plan.keys * p.head_dim);
    key_columns = space.take(plan.keys * p.head_dim);
    values = space.take(plan.keys * p.head_dim);
    key_sums = space.take(plan.keys * wide);
    scores = space.take(plan.keys * lanes);
    dscores = space.take(plan.keys * lanes);
    seen = reinterpret_cast<int32_t*>(space.take(2 * lanes / kPanel));
    lse = space.take(lanes);
    delta = space.take(lanes);
    scale = space.take(lanes);
    base2_scale = space.take(lanes);
    one = space.take(lanes);
  }
  Workspace space;
  float *q, *dout, *dq;              // (panels, head_dim, kPanel)
  float *q_rows, *dout_rows;         // (head_dim / kWide, lanes, kWide)
  float *keys, *values;              // (keys, head_dim)
  float* key_sums;                   // (keys, head_dim rounded up to kWide)
  float* key_columns;                // (head_dim / kRows, keys, kRows)
  float *scores, *dscores;           // (panels, keys, kPanel)
  int32_t* seen;                     // (panels, 2): the keys of a step that a panel sees
  float *lse, *delta;                // (lanes,); lse to base 2
  float *scale, *base2_scale, *one;  // (lanes,)
};

// In eight sums, since delta is later taken from numbers that nearly equal it.
float dot(const float* a, const float* b, int64_t count) {
  float sums[8] = {};
  for (int64_t i = 0; i < count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// delta = <dout, out> - dlse, and lse to base 2.
template <typename T>
void load_statistics(const TileLanes& lanes, const Backward& w) {
  const AttentionParams& p = lanes.p;
  float out[kMaxHeadDim], dout[kMaxHeadDim];
  for (int64_t lane = 0; lane < lanes.panels * kPanel; ++lane) {
    const bool real = lane < lanes.count;
    w.lse[lane] = w.delta[lane] = 0.0f;
    w.scale[lane] = real ? lanes.scale(lane) : 0.0f;
    w.base2_scale[lane] = w.scale[lane] * kLog2E;
    w.one[lane] = 1.0f;
    if (!real) continue;
    const int64_t at = lanes.statistic(lane);
    const float lse = p.lse[at] * kLog2E;
    w.lse[lane] = lse == -__builtin_inff() ? 0.0f : lse;
    widen_row(static_cast<const T*>(p.out.data) + lanes.offset(p.out, lane), p.head_dim, out);
    widen_row(static_cast<const T*>(p.dout.data) + lanes.offset(p.dout, lane), p.head_dim, dout);
    const float product = dot(out, dout, p.head_dim);
    w.delta[lane] = p.dlse ? product - p.dlse[at] : product;
  }
}

struct PanelView {
  const float *q, *dout, *lse, *delta;
  float *dq, *scores, *dscores;
};

PanelView panel_view(const Backward& w, int64_t panel, int64_t dim, int64_t padded_keys) {
  const int64_t square = panel * dim * kPanel, at = panel * padded_keys * kPanel;
  return {w.q + square,  w.dout + square, w.lse + panel * kPanel, w.delta + panel * kPanel,
          w.dq + square, w.scores + at,   w.dscores + at};
}

// Probabilities of the blocks of one panel, from scores and lse.
template <bool Masked>
EXTROPE_INLINE void probability_blocks(const PanelView& v, const float* keys, int64_t dim,
                                       int64_t begin, int64_t end, const LaneKeys& visible,
                                       int64_t first) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kPanelVectors> sums{};
    multiply_add(sums, keys + key * dim, dim, 1, v.q, kPanel, dim);
    if constexpr (Masked) mask_block(sums, visible, first + key);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVectors; ++j) {
        sums.at[i][j] = exp2_vector(sums.at[i][j] - load<floats>(v.lse + j * kFloats));
      }
    }
    store_sums(sums, v.scores + key * kPanel, kPanel);
  }
}

// Gradients of the scores: probability * (<dout, value> - delta).
void gradient_blocks(const PanelView& v, const float* values, int64_t dim, int64_t begin,
                     int64_t end) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kPanelVectors> sums{};
    multiply_add(sums, values + key * dim, dim, 1, v.dout, kPanel, dim);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVectors; ++j) {
        const floats probability = load<floats>(v.scores + (key + i) * kPanel + j * kFloats);
        sums.at[i][j] = probability * (sums.at[i][j] - load<floats>(v.delta + j * kFloats));
      }
    }
    store_sums(sums, v.dscores + key * kPanel, kPanel);
  }
}

// sum_lanes reads what the panel sees in blocks of kTallRows keys: their rest counts as zero.
void clear_unseen(const PanelView& v, const PanelBlocks& blocks) {
  const int64_t before = blocks.begin % kTallRows, end = round_up(blocks.end, kTallRows);
  for (float* x : {v.scores, v.dscores}) {
    std::memset(x + (blocks.begin - before) * kPanel, 0, before * kPanel * sizeof(float));
    std::memset(x + blocks.end * kPanel, 0, (end - blocks.end) * kPanel * sizeof(float));
  }
}

void visit_panel(const TileLanes& lanes, const Backward& w, int64_t panel, int64_t region,
                 const KeyStep& step) {
  const int64_t dim = lanes.p.head_dim;
  const PanelView v = panel_view(w, panel, dim, step.padded);
  PanelBlocks b = panel_blocks(panel_keys(lanes, panel, region), step.first, step.count);
  if (b.begin >= b.end) b = {0, 0, 0, 0};
  w.seen[2 * panel] = static_cast<int32_t>(b.begin),
             w.seen[2 * panel + 1] = static_cast<int32_t>(b.end);
  if (b.begin == b.end) return;
  clear_unseen(v, b);
  LaneKeys visible;
  if (b.has_shared()) visible = lane_keys(lanes, panel, region);
  probability_blocks<true>(v, w.keys, dim, b.begin, b.full_begin, visible, step.first);
  probability_blocks<false>(v, w.keys, dim, b.full_begin, b.full_end, visible, step.first);
  probability_blocks<true>(v, w.keys, dim, b.full_end, b.end, visible, step.first);
  gradient_blocks(v, w.values, dim, b.begin, b.end);
  for (int64_t d = 0; d < dim; d += kRows) {
    Sums<kRows, kPanelVectors> sums;
    load_sums(sums, v.dq + d * kPanel, kPanel);
    multiply_add(sums, w.key_columns + d * step.padded + b.begin * kRows, 1, kRows,
                 v.dscores + b.begin * kPanel, kPanel, b.end - b.begin);
    store_sums(sums, v.dq + d * kPanel, kPanel);
  }
}

// Writes a region's dq; where q was turned, turns it back and adds it to that of earlier regions.
void write_dq(const TileLanes& lanes, const Backward& w, int64_t region) {
  const AttentionParams& p = lanes.p;
  const AttentionTensor& x = p.dq[region];
  LaneRows rows;
  float back[kMaxHeadDim];
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    if (lane % kFloats == 0) unpack_lanes(w.dq, lane, p.head_dim, w.scale, rows);
    const float* row = rows[lane % kFloats];
    float* to = static_cast<float*>(x.data) + lanes.offset(x, lane);
    const float* by =
        turn_at(p.q_turn[region], lanes.tile.batch, lanes.tile.token_q + lanes.row(lane));
    if (by) turn_row({p.head_dim, p.half, p.interleaved}, row, by, by + p.half, -1.0f, back);
    if (by && region > 0) {
      add_row(back, p.head_dim, to);
    } else {
      std::memcpy(to, by ? back : row, p.head_dim * sizeof(float));
    }
  }
}

// The first key that the regions from `region` on can still touch.
int64_t next_key(const TileLanes& lanes, int64_t region) {
  return region < lanes.p.regions ? tile_keys(lanes, region).first : kAllKeys;
}

template <typename T>
void backward_region(const TileLanes& lanes, const TilePlan& plan, const Backward& w,
                     int64_t region, KeysDone* previous, KeysDone* done) {
  const AttentionParams& p = lanes.p;
  std::memset(w.dq, 0, lanes.panels * kPanel * p.head_dim * sizeof(float));
  const PanelKeys keys = tile_keys(lanes, region);
  if (keys.first < keys.last) {
    pack_panels<T>(lanes, p.q[region], p.q_turn[region], w.base2_scale, w.q);
    pack_wide<T>(lanes, p.q[region], p.q_turn[region], w.scale, w.q_rows);
  }
  for (int64_t first = keys.first; first < keys.last; first += plan.keys) {
    const int64_t count = smaller(plan.keys, keys.last - first);
    const KeyStep step{first, count, round_up(count, kKeyBlock)};
    pack_rows<T>(lanes, p.v, {}, step, w.values);
    pack_rows<T>(lanes, p.k[region], p.k_turn[region], step, w.keys);
    pack_columns(w.keys, p.head_dim, step.padded, w.key_columns);
    const int64_t next = first + count, next_count = smaller(plan.keys, keys.last - next);
    for (int64_t panel = 0; panel < lanes.panels; ++panel) {
      prefetch_share<T>(lanes, p.k[region], next, next_count, panel);
      prefetch_share<T>(lanes, p.v, next, next_count, panel);
      prefetch_share<float>(lanes, p.dk[region], first, count, panel);
      prefetch_share<float>(lanes, p.dv, first, count, panel);
      visit_panel(lanes, w, panel, region, step);
    }
    sum_lanes(lanes, step, w.seen, w.scores, w.dout_rows, w.key_sums);
    wait_for_keys(previous, first + count);
    add_keys(lanes, step, {}, w.key_sums, p.dv);
    sum_lanes(lanes, step, w.seen, w.dscores, w.q_rows, w.key_sums);
    add_keys(lanes, step, p.k_turn[region], w.key_sums, p.dk[region]);
    done->store(smaller(first + count, next_key(lanes, region + 1)), std::memory_order_release);
  }
  write_dq(lanes, w, region);
}

template <typename T>
void backward(const TileLanes& lanes, const TilePlan& plan, const Backward& w, KeysDone* previous,
              KeysDone* done) {
  load_statistics<T>(lanes, w);
  pack_panels<T>(lanes, lanes.p.dout, {}, w.one, w.dout);
  pack_wide<T>(lanes, lanes.p.dout, {}, w.one, w.dout_rows);
  for (int64_t region = 0; region < lanes.p.regions; ++region) {
    backward_region<T>(lanes, plan, w, region, previous, done);
  }
  wait_for_keys(previous, kAllKeys);
  done->store(kAllKeys, std::memory_order_release);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_backward_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t lanes =
      greater(smaller(kTileFloats / p.head_dim, kMaxTileLanes) / kPanel, 1) * kPanel;
  plan.rows = tile_rows(p, lanes);
  plan.keys = smaller(kStepKeys, round_up(greater(p.seqlen_k, 1), kKeyBlock));
  plan.workspace = Backward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_backward_tile_, EXTROPE_ISA)(const AttentionParams& p,
                                                           const QueryTile& tile,
                                                           const TilePlan& plan, float* workspace,
                                                           KeysDone* previous, KeysDone* done) {
  const TileLanes lanes{p, tile};
  const Backward w(p, plan, workspace);
  switch (p.dtype) {
    case DType::bf16:
      return backward<bf16>(lanes, plan, w, previous, done);
    case DType::f16:
      return backward<f16>(lanes, plan, w, previous, done);
    default:
      return backward<float>(lanes, plan, w, previous, done);
  }
}

}  // namespace extrope
