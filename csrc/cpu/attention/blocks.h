// How a tile of the forward walks its keys: once, whatever the regions.
//
// The regions of a row follow each other without a gap, so a step of keys belongs to one region but
// for the few where the rows of the tile change over. Those hold the keys in the frames of both;
// blocks of kRows keys in which the rows of a panel agree need one product, the others one for each
// region, of which every row takes its own.
#pragma once

#include "cpu/attention/tile.h"

namespace extrope {
namespace {

// The keys that a tile sees, of each region and in all.
struct TileWalk {
  PanelKeys keys[kMaxRegions];
  int64_t first, last;

  explicit TileWalk(const TileLanes& lanes) {
    for (int64_t r = 0; r < lanes.p.regions; ++r) keys[r] = tile_keys(lanes, r);
    first = keys[0].first, last = keys[lanes.p.regions - 1].last;
  }
  bool sees(int64_t region) const { return keys[region].first < keys[region].last; }
  KeyStep step(int64_t from, int64_t keys_of_step) const {
    const int64_t count = smaller(keys_of_step, last - from);
    return {from, count, round_up(count, kRows)};
  }
};

// The blocks of a step in one region.
inline PanelBlocks region_blocks(const PanelKeys& keys, const KeyStep& step) {
  if (keys.first >= keys.last) return {};
  const PanelBlocks b = panel_blocks(keys, step.first, step.count);
  return b.begin < b.end ? b : PanelBlocks{};
}

// The blocks of a step that a panel sees, of each region and in all. Those of two regions meet, or
// share blocks that are full in neither.
struct WalkBlocks {
  PanelBlocks of[kMaxRegions];
  int64_t begin = 0, end = 0;

  WalkBlocks(const TileLanes& lanes, int64_t panel, const KeyStep& step) {
    for (int64_t r = 0; r < lanes.p.regions; ++r) {
      of[r] = region_blocks(panel_keys(lanes, panel, r), step);
      if (of[r].begin >= of[r].end) continue;
      if (begin == end) begin = of[r].begin;
      end = of[r].end;
    }
  }
};

// Packs what the tile sees of a region by pack(part, offset): the keys from offset on in the step.
template <typename Pack>
inline void pack_part(const TileWalk& walk, int64_t region, const KeyStep& step, const Pack& pack) {
  const PanelBlocks b = region_blocks(walk.keys[region], step);
  if (b.begin >= b.end) return;
  const int64_t count = smaller(b.end, step.count) - b.begin;
  pack(KeyStep{step.first + b.begin, count, b.end - b.begin}, b.begin);
}

// Fetches a panel's share of the keys and values of the step that starts at key `from`.
template <typename T>
inline void prefetch_step(const TileLanes& lanes, const TileWalk& walk, int64_t from, int64_t keys,
                          int64_t panel) {
  const int64_t to = smaller(from + keys, walk.last);
  prefetch_share<T>(lanes, lanes.p.v, from, to - from, panel);
  for (int64_t r = 0; r < lanes.p.regions; ++r) {
    const int64_t first = greater(from, walk.keys[r].first);
    prefetch_share<T>(lanes, lanes.p.k[r], first, smaller(to, walk.keys[r].last) - first, panel);
  }
}

// Of sums, what a lane sees in the region; of the rest, what earlier regions left in `scores`, or
// -inf where they had no part in this block.
EXTROPE_INLINE void merge_block(Sums<kRows, kPanelVectors>& sums, const LaneKeys& keys, int64_t key,
                                bool first, const float* scores) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVectors; ++j) {
      const ints visible = (here >= keys.first[j]) & (here < keys.last[j]);
      floats rest = floats{} - __builtin_inff();
      if (!first) rest = load<floats>(scores + i * kPanel + j * kFloats);
      sums.at[i][j] = visible ? sums.at[i][j] : rest;
    }
  }
}

// Of each lane, whose probabilities from `maximum` on sum to `sum`: what its row is scaled by, and
// its lse.
inline void finish_sums(const TileLanes& lanes, const float* maximum, const float* sum,
                        float* scale) {
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    const bool none = sum[lane] == 0.0f;
    scale[lane] = none ? 0.0f : 1.0f / sum[lane];
    lanes.p.lse[lanes.statistic(lane)] =
        none ? -__builtin_inff() : maximum[lane] * kLn2 + __builtin_logf(sum[lane]);
  }
}

}  // namespace
}  // namespace extrope
