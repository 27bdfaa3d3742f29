// Tiles of the attention's forward and backward: the layout of rows in vectors, and the keys that
// rows see. Ranges of keys are [begin, end).
//
// A row is one token of one q head. A tile has all q heads that share a head of k, so keys and
// values are packed once for all of them; its rows are in the order token (slow), q head (fast).
// Logits are transposed, a vector of rows per key: then maxima and sums over keys need no work
// across the vector, and the rows of k and v need no transposition.
#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/gemm.h"

namespace extrope {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

// A product keeps the logits of kKeyRows keys and kQueryLanes rows in registers, a row in each
// lane. kQueryLanes rows of a tile are a slice; kKeyRows keys of a block are a part.
#if defined(__AVX512BF16__)
constexpr int kKeyRows = 32, kQueryVectors = 4;  // two by four tiles of 16 x 16 sums
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int kKeyRows = 8, kQueryVectors = 3;  // 24 sums in 32 registers
#else
constexpr int kKeyRows = 4, kQueryVectors = 3;  // 12 sums in 16 registers
#endif
constexpr int64_t kQueryLanes = kQueryVectors * kFloats;  // 12 to 64

// Returns a tile's tokens, for at most block_m rows. Larger tiles pack less per row; but every head
// should make at least kTiles, so that every thread gets some.
inline int64_t tokens_per_tile(const AttentionParams& p, int64_t block_m) {
  constexpr int64_t kTiles = 8, kLeastRows = 192;
  const int64_t group = p.heads_q / p.heads_k, least = smaller(kLeastRows, block_m);
  const int64_t rows = round_up(greater(p.seqlen_q * group / kTiles, least), kQueryLanes);
  return smaller(greater(smaller(rows, block_m) / group, 1), greater(p.seqlen_q, 1));
}

// Returns the rows of a tile, including the padding of its last slice.
inline int64_t rows_of(const AttentionParams& p, const TilePlan& plan) {
  return round_up(plan.tokens * (p.heads_q / p.heads_k), kQueryLanes);
}

// The rows of a tile, in slices of kQueryLanes rows; the last slice is padded.
struct TileQueries {
  const AttentionParams& p;
  const QueryTile& tile;
  int64_t heads = p.heads_q / p.heads_k;  // q heads that share the tile's head of k
  int64_t count = tile.tokens * heads;    // rows without the padding
  int64_t slices = (count + kQueryLanes - 1) / kQueryLanes;

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
    return tile.batch * x.stride_batch + (tile.first_q + token) * x.stride_seq +
           head * x.stride_head;
  }
  int64_t lse_index(int64_t row) const { return lse_index(token(row), head(row)); }
  int64_t lse_index(int64_t token, int64_t head) const {
    return (tile.batch * p.heads_q + head) * p.lse_head + tile.first_q + token;
  }
  // Returns the factor of a row's logits: softmax_scale, query_scale, and k_scale.
  float logit_scale(int64_t row) const {
    float scale = static_cast<float>(p.softmax_scale);
    if (p.k_scale) scale *= p.k_scale[tile.head];
    if (!p.query_scale.data) return scale;
    return scale * p.query_scale.of(tile.batch, tile.first_q + token(row));
  }
  // Calls visit(i, token, head) for row first + i, for a vector's number of rows. It avoids the two
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

// The keys of one region, in the sequence: some row of a slice sees [begin, end), every row
// [full_begin, full_end). Positions rise with the rows, so the slice's end rows decide both.
struct SliceKeys {
  int64_t begin, end, full_begin, full_end;
};

inline SliceKeys slice_keys(const TileQueries& queries, int64_t slice, int64_t region) {
  const int64_t first = slice * kQueryLanes;
  const int64_t last = smaller(first + kQueryLanes, queries.count) - 1;
  const int64_t low = queries.position(first), high = queries.position(last);
  return {queries.first_key(region, low), queries.first_key(region + 1, high),
          queries.first_key(region, high), queries.first_key(region + 1, low)};
}

// Returns the keys that some row of the tile sees; full_begin and full_end are not set.
inline SliceKeys tile_keys(const TileQueries& queries, int64_t region) {
  const int64_t low = queries.position(0), high = queries.position(queries.count - 1);
  return {queries.first_key(region, low), queries.first_key(region + 1, high), 0, 0};
}

// A slice's parts of a block of keys in one region, counted in keys from the block's first one;
// forward_kernel.cpp draws them. In full parts every row sees every key, in merged ones some rows
// see keys of other regions, or none. All four are multiples of kKeyRows.
struct SliceParts {
  int64_t begin, full_begin, full_end, end;

  bool has_merged() const { return full_begin > begin || end > full_end; }
};

inline SliceParts slice_parts(const SliceKeys& keys, int64_t block_first, int64_t block_keys) {
  const auto inside = [&](int64_t key) {
    return smaller(greater(key - block_first, 0), block_keys);
  };
  SliceParts parts{
      inside(keys.begin) / kKeyRows * kKeyRows, round_up(inside(keys.full_begin), kKeyRows),
      inside(keys.full_end) / kKeyRows * kKeyRows, round_up(inside(keys.end), kKeyRows)};
  if (parts.full_begin >= parts.full_end) parts.full_begin = parts.full_end = parts.end;
  return parts;
}

// The keys that each row of a slice sees in a region, a row in each lane.
struct RowKeys {
  ints begin[kQueryVectors], end[kQueryVectors];
};

inline RowKeys row_keys(const TileQueries& queries, int64_t slice, int64_t region) {
  int32_t begin[kQueryLanes] = {}, end[kQueryLanes] = {};
  const int64_t first = slice * kQueryLanes, count = smaller(kQueryLanes, queries.count - first);
  // All heads of a token see the same keys; token_end is the first row of the next token.
  int64_t position = queries.position(first), token_end = queries.heads - first % queries.heads;
  for (int64_t i = 0; i < count; ++position, token_end += queries.heads) {
    const auto from = static_cast<int32_t>(queries.first_key(region, position));
    const auto to = static_cast<int32_t>(queries.first_key(region + 1, position));
    for (; i < smaller(token_end, count); ++i) begin[i] = from, end[i] = to;
  }
  RowKeys keys;
  std::memcpy(keys.begin, begin, sizeof(begin));
  std::memcpy(keys.end, end, sizeof(end));
  return keys;
}

}  // namespace
}  // namespace extrope
