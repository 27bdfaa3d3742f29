// Tiles of the attention's forward and backward: the layout of rows in vectors, and the keys that
// rows see.
//
// A row is one token of one q head. All q heads that share a head of k are neighbours in a tile,
// head fastest, so keys and values are packed once for all of them. Scores are transposed, a vector
// of rows per key: then maxima and sums over keys need no work across the vector, and the rows of k
// and v need no transposition.
#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/gemm.h"

namespace extrope {
namespace {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
// A slice has as many rows as a panel of a product has columns.
constexpr int64_t kSlice = kPanel;
constexpr int kSliceVectors = kPanelVectors;

// Larger tiles pack less per row; but every head should make at least kTiles, so that every thread
// gets some.
inline int64_t tile_rows(const AttentionParams& p, int64_t block) {
  constexpr int64_t kTiles = 8, kLeastLanes = 192;
  const int64_t group = p.heads_q / p.heads_k, least = smaller(kLeastLanes, block);
  block = smaller(round_up(greater(p.seqlen_q * group / kTiles, least), kSlice), block);
  return smaller(greater(block / group, 1), greater(p.seqlen_q, 1));
}

// Returns the rows of a tile, including the padding of its last slice.
inline int64_t rows_of(const AttentionParams& p, const TilePlan& plan) {
  return round_up(plan.tokens * (p.heads_q / p.heads_k), kSlice);
}

// The rows of a tile in slices of kSlice; the last slice is padded.
struct BlockRows {
  const AttentionParams& p;
  const QueryTile& tile;
  int64_t heads = p.heads_q / p.heads_k;
  int64_t count = tile.tokens * heads;
  int64_t slices = (count + kSlice - 1) / kSlice;

  int64_t token(int64_t row) const { return tile.token + row / heads; }
  int64_t head(int64_t row) const { return tile.head * heads + row % heads; }
  int64_t position(int64_t row) const { return tile.q_start + token(row); }
  // Returns the index of a region's first key in the sequence, for the query at `position`.
  int64_t first_key(int64_t region, int64_t position) const {
    const int64_t key = p.regions.start(region, position) - tile.k_start;
    return smaller(greater(key, 0), tile.seqlen_k);
  }
  int64_t offset(const AttentionTensor& x, int64_t row) const {
    return offset(x, token(row), head(row));
  }
  int64_t offset(const AttentionTensor& x, int64_t token, int64_t head) const {
    return tile.batch * x.batch + (tile.first_q + token) * x.seq + head * x.head;
  }
  int64_t lse_index(int64_t row) const { return lse_index(token(row), head(row)); }
  int64_t lse_index(int64_t token, int64_t head) const {
    return (tile.batch * p.heads_q + head) * p.lse_head + tile.first_q + token;
  }
  float scale(int64_t row) const {
    const float scale = p.k_scale ? p.softmax_scale * p.k_scale[tile.head] : p.softmax_scale;
    if (!p.row_scale.data) return scale;
    return scale * p.row_scale.of(tile.batch, tile.first_q + token(row));
  }
  // Calls visit(i, row, head) for row first + i, for a vector's number of rows. It avoids the two
  // divisions per row of the functions above, which take longer than copying the row.
  template <typename Visit>
  void each_of_vector(int64_t first, const Visit& visit) const {
    int64_t token = this->token(first), head = first % heads;
    for (int64_t i = 0; i < smaller(kFloats, count - first); ++i) {
      visit(i, token, tile.head * heads + head);
      if (++head == heads) head = 0, ++token;
    }
  }
};

// The keys of one region that a slice sees: any row sees [first, last), every row [full_first,
// full_last). Positions rise with the rows, so the slice's end rows decide both.
struct SliceKeys {
  int64_t first, last, full_first, full_last;
};

inline SliceKeys slice_keys(const BlockRows& block, int64_t slice, int64_t region) {
  const int64_t begin = slice * kSlice, end = smaller(begin + kSlice, block.count) - 1;
  const int64_t low = block.position(begin), high = block.position(end);
  return {block.first_key(region, low), block.first_key(region + 1, high),
          block.first_key(region, high), block.first_key(region + 1, low)};
}

inline SliceKeys tile_keys(const BlockRows& block, int64_t region) {
  const int64_t low = block.position(0), high = block.position(block.count - 1);
  return {block.first_key(region, low), block.first_key(region + 1, high), 0, 0};
}

// A key block in parts of kRows keys, counted from its first key: the slice sees those from begin
// to end; all its rows see those from full_begin to full_end.
struct SliceBlocks {
  int64_t begin, full_begin, full_end, end;

  bool has_shared() const { return full_begin > begin || end > full_end; }
};

inline SliceBlocks slice_blocks(const SliceKeys& keys, int64_t block_first, int64_t block_keys) {
  const auto inside = [&](int64_t key) {
    return smaller(greater(key - block_first, 0), block_keys);
  };
  SliceBlocks b{inside(keys.first) / kRows * kRows, round_up(inside(keys.full_first), kRows),
                inside(keys.full_last) / kRows * kRows, round_up(inside(keys.last), kRows)};
  if (b.full_begin >= b.full_end) b.full_begin = b.full_end = b.end;
  return b;
}

// Per row: the first key that it sees in a region, and the first one after those.
struct RowKeys {
  ints first[kSliceVectors], last[kSliceVectors];
};

inline RowKeys row_keys(const BlockRows& block, int64_t slice, int64_t region) {
  int32_t first[kSlice] = {}, last[kSlice] = {};
  const int64_t begin = slice * kSlice, count = smaller(kSlice, block.count - begin);
  int64_t position = block.position(begin), row_end = block.heads - begin % block.heads;
  for (int64_t i = 0; i < count; ++position, row_end += block.heads) {
    const auto from = static_cast<int32_t>(block.first_key(region, position));
    const auto to = static_cast<int32_t>(block.first_key(region + 1, position));
    for (; i < smaller(row_end, count); ++i) first[i] = from, last[i] = to;
  }
  RowKeys keys;
  std::memcpy(keys.first, first, sizeof(first));
  std::memcpy(keys.last, last, sizeof(last));
  return keys;
}

EXTROPE_INLINE void mask_block(Sums<kRows, kSliceVectors>& sums, const RowKeys& keys, int64_t key) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const ints visible = (here >= keys.first[j]) & (here < keys.last[j]);
      sums.at[i][j] = visible ? sums.at[i][j] : floats{} - __builtin_inff();
    }
  }
}

}  // namespace
}  // namespace extrope
