// Forward of the attention over regions in bf16, on processors with AMX or AVX512_BF16. Compiled
// once for each, with EXTROPE_ISA as its name.
//
// As attention_kernel.cpp, with scores, probabilities and the output transposed as there: keys are
// the left factor of the scores and lie in tiles as they come, and the probabilities of two keys
// are a pair of the right factor of the output. Probabilities are rounded to bf16, sums are not.

#include "cpu/attention/bf16.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

constexpr int64_t kTileLanes = 1024, kStepKeys = 256;
// The running maximum starts here rather than at -inf, so that differences are never NaN.
constexpr float kLowest = -1e30f;
// Probabilities are taken from a maximum that the sums of later blocks may pass by this factor
// before it is raised: so far, neither floats nor bf16 lose precision, and it saves a search for
// the largest score of each block.
constexpr float kHeadroom = 4096.0f;
static_assert(kHeadroom > kRows);

struct Forward {
  Forward(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t lanes = round_up(plan.rows * (p.heads_q / p.heads_k), kPanel);
    const int64_t dim = round_up(p.head_dim, kDepth);
    q = take_values(space, p.regions * lanes * dim);
    keys = take_values(space, p.regions * plan.keys * dim);
    values = take_values(space, plan.keys * dim);
    weights = take_values(space, plan.keys * kPanel);
    scores = space.take(kRows * kPanel);
    product = space.take(kRows * kPanel);
    out = space.take(lanes * dim);
    maximum = space.take(lanes);
    sum = space.take(lanes);
    scale = space.take(lanes);
  }
  Workspace space;
  bf16* q;                       // (regions, panels, dim / 32, kPanelTiles) right tiles of 16 lanes
  bf16* keys;                    // (regions, keys / 16, dim / 32) left tiles
  bf16* values;                  // (dim / 16, keys / 32) left tiles, transposed
  bf16* weights;                 // (keys / 32, kPanelTiles) right tiles of 16 lanes
  float *scores, *product;       // (kRows, kPanel)
  float* out;                    // (panels, dim / 16, kPanelTiles) tiles of sums, transposed
  float *maximum, *sum, *scale;  // (lanes,), to base 2
};

// A panel at work on the keys of a step.
struct Visit {
  const Forward& w;
  const bf16* q;
  float* out;
  int64_t next_q, next_keys;     // from one region to the next
  int64_t dim_tiles, key_tiles;  // of a step
  floats maximum[kPanelVectors], sum[kPanelVectors], scale[kPanelVectors];
};

EXTROPE_INLINE void multiply_block(const Visit& v, int64_t region, int64_t key, float* to) {
  const bf16 *keys = v.w.keys + region * v.next_keys + key * v.dim_tiles * kDepth,
             *q = v.q + region * v.next_q;
  for (int64_t tile = 0; tile < kPanelTiles; tile += 2) {
    product_of_tiles({keys, v.dim_tiles * kTileValues, kTileValues, q + tile * kTileValues,
                      kPanelTiles * kTileValues, v.dim_tiles},
                     {to + tile * kSide, kSide * kPanel, kSide, kPanel});
  }
}

// The scores of a block of keys, which starts at key `first` of all.
EXTROPE_INLINE void score(const Visit& v, const WalkBlocks& blocks, int64_t regions,
                          const LaneKeys* visible, int64_t key, int64_t first) {
  bool written = false;
  for (int64_t r = 0; r < regions; ++r) {
    const PanelBlocks& b = blocks.of[r];
    if (key < b.begin || key >= b.end) continue;
    const bool full = key >= b.full_begin && key < b.full_end;
    multiply_block(v, r, key, full ? v.w.scores : v.w.product);
    if (!full) merge_rows(v.w.product, visible[r], first, !written, v.w.scores);
    written = true;
  }
}

// out += values * weights, for the keys from `begin` to `end` of the step.
void add_values(const Visit& v, int64_t begin, int64_t end) {
  const int64_t first = begin / kDepth, tiles = (end - begin) / kDepth;
  for (int64_t d = 0; d < v.dim_tiles && tiles > 0; ++d) {
    for (int64_t tile = 0; tile < kPanelTiles; tile += 2) {
      add_product_of_tiles(
          {v.w.values + (2 * d * v.key_tiles + first) * kTileValues, v.key_tiles * kTileValues,
           kTileValues, v.w.weights + (first * kPanelTiles + tile) * kTileValues,
           kPanelTiles * kTileValues, tiles},
          {v.out + (2 * d * kPanelTiles + tile) * kTileSums, kPanelTiles * kTileSums, kTileSums,
           kSide});
    }
  }
}

// Scores of a block to probabilities, in pairs of keys; false if the maximum they are taken from is
// too far below them.
EXTROPE_INLINE bool soften(Visit& v, bf16* weights) {
  floats sum[kPanelVectors] = {};
  for (int64_t i = 0; i < kRows; i += 2) {
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVectors; ++j) {
      const float* at = v.w.scores + i * kPanel + j * kFloats;
      const floats a = exp2_reduced(load<floats>(at) * v.scale[j] - v.maximum[j]);
      const floats b = exp2_reduced(load<floats>(at + kPanel) * v.scale[j] - v.maximum[j]);
      sum[j] += a + b;
      store(weights + j * kTileValues + i * kSide, pair_values(a, b));
    }
  }
  unsigned above = 0;
#pragma GCC unroll 16
  for (int j = 0; j < kPanelVectors; ++j) {
    above |= _mm512_cmp_ps_mask(sum[j], floats{} + kHeadroom, _CMP_GT_OQ);
  }
  if (above) return false;
#pragma GCC unroll 16
  for (int j = 0; j < kPanelVectors; ++j) v.sum[j] += sum[j];
  return true;
}

// Takes the largest score of the block as the maximum, and scales earlier sums down to it.
void raise_maximum(Visit& v) {
  for (int j = 0; j < kPanelVectors; ++j) {
    floats found = v.maximum[j];
    for (int i = 0; i < kRows; ++i) {
      found = larger(found, load<floats>(v.w.scores + i * kPanel + j * kFloats) * v.scale[j]);
    }
    const floats shrink = exp2_reduced(v.maximum[j] - found);
    v.maximum[j] = found;
    v.sum[j] *= shrink;
    for (int64_t d = 0; d < 2 * v.dim_tiles; ++d) {
      float* sums = v.out + (d * kPanelTiles + j) * kTileSums;
      for (int64_t i = 0; i < kTileSums; i += kFloats) {
        store(sums + i, load<floats>(sums + i) * shrink);
      }
    }
  }
}

void visit_panel(const TileLanes& lanes, const TilePlan& plan, const Forward& w, int64_t panel,
                 const KeyStep& step) {
  const WalkBlocks blocks(lanes, panel, step);
  if (blocks.begin >= blocks.end) return;
  const int64_t dim_tiles = dim_tiles_of(lanes.p), size = dim_tiles * kDepth * kPanel;
  Visit v{w,
          w.q + panel * size,
          w.out + panel * size,
          lanes.panels * size,
          plan.keys * dim_tiles * kDepth,
          dim_tiles,
          step.padded / kDepth};
  for (int j = 0; j < kPanelVectors; ++j) {
    const int64_t at = panel * kPanel + j * kFloats;
    v.maximum[j] = load<floats>(w.maximum + at);
    v.sum[j] = load<floats>(w.sum + at);
    v.scale[j] = load<floats>(w.scale + at);
  }
  LaneKeys visible[kMaxRegions];
  for (int64_t r = 0; r < lanes.p.regions; ++r) {
    if (blocks.of[r].has_shared()) visible[r] = lane_keys(lanes, panel, r);
  }
  int64_t added = blocks.begin;
  for (int64_t key = blocks.begin; key < blocks.end; key += kRows) {
    score(v, blocks, lanes.p.regions, visible, key, step.first + key);
    bf16* weights = w.weights + key * kPanel;
    if (!soften(v, weights)) {
      add_values(v, added, key);
      added = key;
      raise_maximum(v);
      soften(v, weights);
    }
  }
  add_values(v, added, blocks.end);
  for (int j = 0; j < kPanelVectors; ++j) {
    const int64_t at = panel * kPanel + j * kFloats;
    store(w.maximum + at, v.maximum[j]);
    store(w.sum + at, v.sum[j]);
  }
}

// Divides by the sums of probabilities and writes out and lse.
void finish(const TileLanes& lanes, const Forward& w) {
  finish_sums(lanes, w.maximum, w.sum, w.scale);
  unpack_sums(lanes, w.out, w.scale, lanes.p.out);
}

void forward(const TileLanes& lanes, const TilePlan& plan, const Forward& w) {
  const AttentionParams& p = lanes.p;
  const int64_t padded = lanes.panels * kPanel;
  std::memset(w.out, 0, padded * round_up(p.head_dim, kDepth) * sizeof(float));
  std::memset(w.sum, 0, padded * sizeof(float));
  for (int64_t lane = 0; lane < padded; ++lane) {
    w.maximum[lane] = kLowest;
    w.scale[lane] = lane < lanes.count ? lanes.scale(lane) * kLog2E : 1.0f;
  }
  const int64_t dim = round_up(p.head_dim, kDepth);
  const TileWalk walk(lanes);
  for (int64_t r = 0; r < p.regions; ++r) {
    if (walk.sees(r)) pack_lane_pairs(lanes, p.q[r], p.q_turn[r], w.q + r * padded * dim);
  }
  for (int64_t first = walk.first; first < walk.last; first += plan.keys) {
    const KeyStep step = walk.step(first, plan.keys);
    pack_key_columns(lanes, p.v, step, w.values);
    for (int64_t r = 0; r < p.regions; ++r) {
      pack_part(walk, r, step, [&](const KeyStep& part, int64_t offset) {
        pack_key_rows(lanes, p.k[r], part, w.keys + (r * plan.keys + offset) * dim);
      });
    }
    for (int64_t panel = 0; panel < lanes.panels; ++panel) {
      prefetch_step<bf16>(lanes, walk, first + plan.keys, plan.keys, panel);
      visit_panel(lanes, plan, w, panel, step);
    }
  }
  finish(lanes, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t longest_q = greater(p.seqlen_q, 1), longest_k = greater(p.seqlen_k, 1);
  plan.rows = smaller(greater(kTileLanes / (p.heads_q / p.heads_k), 1), longest_q);
  plan.keys = smaller(kStepKeys, round_up(longest_k, kRows));
  plan.workspace = Forward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  const ProductUnit unit;
  forward({p, tile}, plan, Forward(p, plan, workspace));
}

}  // namespace extrope
