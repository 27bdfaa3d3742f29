// The blocks of keys that a tile of the forward reads, each once for all regions.
//
// The regions of a row follow each other without a gap. So a block of keys belongs to one region,
// except the few in which the rows of the tile change to the next region. Those blocks hold keys
// rotated for both. Parts of kRows keys in which the rows of a slice agree need one product; others
// need one per region, and every row takes its own.

#pragma once

#include "cpu/attention/packing.h"
#include "cpu/simd/softmax.h"

namespace extrope {
namespace {

// The keys that a tile sees, in each region and in all.
struct BlockKeys {
  SliceKeys keys[kMaxRegions] = {};
  int64_t first, last;

  explicit BlockKeys(const BlockRows& block) {
    for (int64_t r = 0; r < block.p.regions.count; ++r) keys[r] = tile_keys(block, r);
    first = keys[0].first, last = keys[block.p.regions.count - 1].last;
  }
  bool sees(int64_t region) const { return keys[region].first < keys[region].last; }
  KeyBlock key_block(int64_t from, int64_t block_n) const {
    const int64_t count = smaller(block_n, last - from);
    return {from, count, round_up(count, kRows)};
  }
};

// The parts of a key block in one region.
inline SliceBlocks region_blocks(const SliceKeys& keys, const KeyBlock& key_block) {
  if (keys.first >= keys.last) return {};
  const SliceBlocks b = slice_blocks(keys, key_block.first, key_block.count);
  return b.begin < b.end ? b : SliceBlocks{};
}

// The parts of a key block that a slice sees, in each region and in all. Parts of two regions are
// adjacent, or share parts that are full in neither.
struct RegionBlocks {
  SliceBlocks of[kMaxRegions];
  int64_t begin = 0, end = 0;
  bool earlier = false;  // true if it sees a key before the block

  RegionBlocks(const BlockRows& block, int64_t slice, const KeyBlock& key_block) {
    for (int64_t r = 0; r < block.p.regions.count; ++r) {
      const SliceKeys keys = slice_keys(block, slice, r);
      earlier = earlier || (keys.first < keys.last && keys.first < key_block.first);
      of[r] = region_blocks(keys, key_block);
      if (of[r].begin >= of[r].end) continue;
      if (begin == end) begin = of[r].begin;
      end = of[r].end;
    }
  }
};

inline bool sees_keys(const BlockRows& block, int64_t slice) {
  for (int64_t r = 0; r < block.p.regions.count; ++r) {
    const SliceKeys keys = slice_keys(block, slice, r);
    if (keys.first < keys.last) return true;
  }
  return false;
}

// Calls pack(part, offset) for the keys that the tile sees in a region: from offset on in the
// key_block.
template <typename Pack>
inline void pack_part(const BlockKeys& seen, int64_t region, const KeyBlock& key_block,
                      const Pack& pack) {
  const SliceBlocks b = region_blocks(seen.keys[region], key_block);
  if (b.begin >= b.end) return;
  const int64_t count = smaller(b.end, key_block.count) - b.begin;
  pack(KeyBlock{key_block.first + b.begin, count, b.end - b.begin}, b.begin);
}

// Prefetches a slice's share of the keys and values of the key block from key `from` on.
template <typename T>
inline void prefetch_block(const BlockRows& block, const BlockKeys& seen, int64_t from,
                           int64_t keys, int64_t slice) {
  const int64_t to = smaller(from + keys, seen.last);
  prefetch_share<T>(block, block.p.v, from, to - from, slice);
  for (int64_t r = 0; r < block.p.regions.count; ++r) {
    const int64_t first = greater(from, seen.keys[r].first);
    prefetch_share<T>(block, block.p.k[r], first, smaller(to, seen.keys[r].last) - first, slice);
  }
}

// Keeps in `sums` the keys that a row sees in the region. Replaces the others by earlier regions'
// `scores`, or by -inf if this is the first region with a part in the block.
EXTROPE_INLINE void merge_block(Sums<kRows, kSliceVectors>& sums, const RowKeys& keys, int64_t key,
                                bool first, const float* scores) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const ints visible = (here >= keys.first[j]) & (here < keys.last[j]);
      floats rest = floats{} - __builtin_inff();
      if (!first) rest = load<floats>(scores + i * kSlice + j * kFloats);
      sums.at[i][j] = visible ? sums.at[i][j] : rest;
    }
  }
}

// Computes the scale of each row's output and its lse from `row_max` and the sum `row_sum` of its
// probabilities; a sink joins both.
inline void finish_sums(const BlockRows& block, const float* row_max, const float* row_sum,
                        float* scale) {
  const Sinks& sinks = block.p.sinks;
  const auto finish = [&](int64_t row, int64_t token, int64_t head) {
    const bool none = row_sum[row] == 0.0f;
    scale[row] = none ? 0.0f : 1.0f / row_sum[row];
    float& lse = block.p.lse[block.lse_index(token, head)];
    lse = none ? -__builtin_inff() : row_max[row] * kLn2 + __builtin_logf(row_sum[row]);
    if (sinks.data) join_sink(sinks.of(head), scale[row], lse);
    if (block.p.v_scale) scale[row] *= block.p.v_scale[block.tile.head];
  };
  for (int64_t first = 0; first < block.count; first += kFloats) {
    block.each_of_vector(
        first, [&](int64_t i, int64_t token, int64_t head) { finish(first + i, token, head); });
  }
}

}  // namespace
}  // namespace extrope
