// The blocks of keys that a tile of the forward reads, each once for all regions; see
// forward_kernel.cpp. Most blocks belong to one region. The few in which the rows of the tile
// change to the next one hold keys rotated for both.

#pragma once

#include "cpu/attention/packing.h"
#include "cpu/simd/softmax.h"

namespace extrope {
namespace {

// The keys that a tile sees, in each region and in all.
struct TileKeys {
  SliceKeys keys[kMaxRegions] = {};
  int64_t begin, end;

  explicit TileKeys(const TileQueries& queries) {
    for (int64_t r = 0; r < queries.p.regions.count; ++r) keys[r] = tile_keys(queries, r);
    begin = keys[0].begin, end = keys[queries.p.regions.count - 1].end;
  }
  bool sees(int64_t region) const { return keys[region].begin < keys[region].end; }
  KeyBlock key_block(int64_t first, int64_t block_n) const {
    const int64_t count = smaller(block_n, end - first);
    return {first, count, round_up(count, kKeyRows)};
  }
};

// Returns the parts in one region; empty ones begin and end at 0.
inline SliceParts region_parts(const SliceKeys& keys, const KeyBlock& key_block) {
  if (keys.begin >= keys.end) return {};
  const SliceParts parts = slice_parts(keys, key_block.first, key_block.count);
  return parts.begin < parts.end ? parts : SliceParts{};
}

// A slice's parts of a block of keys, in each region and in all. Parts of two regions are adjacent,
// or share parts that are full in neither.
struct RegionParts {
  SliceParts of[kMaxRegions];
  int64_t begin = 0, end = 0;
  bool sees_earlier = false;  // true if some row sees a key before the block

  RegionParts(const TileQueries& queries, int64_t slice, const KeyBlock& key_block) {
    for (int64_t r = 0; r < queries.p.regions.count; ++r) {
      const SliceKeys keys = slice_keys(queries, slice, r);
      sees_earlier = sees_earlier || (keys.begin < keys.end && keys.begin < key_block.first);
      of[r] = region_parts(keys, key_block);
      if (of[r].begin >= of[r].end) continue;
      if (begin == end) begin = of[r].begin;
      end = of[r].end;
    }
  }
};

// Calls pack(keys, offset) for the keys of a block that the tile sees in a region: they begin
// `offset` keys after the block.
template <typename Pack>
inline void pack_region(const TileKeys& seen, int64_t region, const KeyBlock& key_block,
                        const Pack& pack) {
  const SliceParts parts = region_parts(seen.keys[region], key_block);
  if (parts.begin >= parts.end) return;
  const int64_t count = smaller(parts.end, key_block.count) - parts.begin;
  pack(KeyBlock{key_block.first + parts.begin, count, parts.end - parts.begin}, parts.begin);
}

// Prefetches a slice's share of the keys and values of the key block from key `from` on.
template <typename T>
inline void prefetch_block(const TileQueries& queries, const TileKeys& seen, int64_t from,
                           int64_t keys, int64_t slice) {
  const int64_t to = smaller(from + keys, seen.end);
  prefetch_share<T>(queries, queries.p.v, from, to - from, slice);
  for (int64_t r = 0; r < queries.p.regions.count; ++r) {
    const int64_t first = greater(from, seen.keys[r].begin);
    prefetch_share<T>(queries, queries.p.k[r], first, smaller(to, seen.keys[r].end) - first, slice);
  }
}

// Ends the online softmax: out_scale = v_scale / row_sum, the factor of each row's sums over
// values, and lse = row_max * unit + ln(row_sum); unit: ln 2 if logits are to base 2. A sink joins
// both. A row without keys gets 0 and -inf.
inline void finish_softmax(const TileQueries& queries, const float* row_max, const float* row_sum,
                           double unit, float* out_scale) {
  const Sinks& sinks = queries.p.sinks;
  const auto finish = [&](int64_t row, int64_t token, int64_t head) {
    const bool none = row_sum[row] == 0.0f;
    out_scale[row] = none ? 0.0f : 1.0f / row_sum[row];
    float& lse = queries.p.lse[queries.lse_index(token, head)];
    const double max = row_max[row] * unit;
    lse = none ? -__builtin_inff() : static_cast<float>(max + __builtin_logf(row_sum[row]));
    if (sinks.data) join_sink(sinks.of(head), out_scale[row], lse);
    if (queries.p.v_scale) out_scale[row] *= queries.p.v_scale[queries.tile.head];
  };
  for (int64_t first = 0; first < queries.count; first += kFloats) {
    queries.each_of_vector(
        first, [&](int64_t i, int64_t token, int64_t head) { finish(first + i, token, head); });
  }
}

}  // namespace
}  // namespace extrope
