// What the forward and the backward of the attention share: how the rows of a tile lie in vectors,
// which keys they see, and the packing of operands.
//
// A row is one token of one q head. All q heads that share a head of k sit side by side in a tile,
// head fastest, so keys and values are packed once for all of them. Scores are kept transposed, a
// vector of rows for each key: then maxima and sums over keys need no work across the vector, and
// the rows of k and v can be read as they lie.
#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/e4m3.h"
#include "cpu/simd/rotate_row.h"
#include "cpu/simd/transpose.h"

namespace extrope {
namespace {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr int64_t kMaxHeadDim = 512;
// A slice is as many rows as a panel of a product has columns.
constexpr int64_t kSlice = kPanel;
constexpr int kSliceVectors = kPanelVectors;

// Tiles of many rows share what they pack among more of them; but every head should make kTiles at
// least, so that there are some for every thread.
inline int64_t tile_rows(const AttentionParams& p, int64_t block) {
  constexpr int64_t kTiles = 8, kLeastLanes = 192;
  const int64_t group = p.heads_q / p.heads_k, least = smaller(kLeastLanes, block);
  block = smaller(round_up(greater(p.seqlen_q * group / kTiles, least), kSlice), block);
  return smaller(greater(block / group, 1), greater(p.seqlen_q, 1));
}

// Of a tile, with those that fill up its last slice.
inline int64_t rows_of(const AttentionParams& p, const TilePlan& plan) {
  return round_up(plan.tokens * (p.heads_q / p.heads_k), kSlice);
}

// The rows of one tile, in slices of kSlice; the last slice is padded.
struct BlockRows {
  const AttentionParams& p;
  const QueryTile& tile;
  int64_t heads = p.heads_q / p.heads_k;
  int64_t count = tile.tokens * heads;
  int64_t slices = (count + kSlice - 1) / kSlice;

  int64_t token(int64_t row) const { return tile.token + row / heads; }
  int64_t head(int64_t row) const { return tile.head * heads + row % heads; }
  int64_t position(int64_t row) const { return tile.q_start + token(row); }
  // Where a region begins for the query at `position`, as an index into the sequence's keys.
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
  int64_t lse_index(int64_t row) const {
    return (tile.batch * p.heads_q + head(row)) * p.lse_head + tile.first_q + token(row);
  }
  float scale(int64_t row) const {
    const int64_t at = tile.first_q + token(row);
    const float scale = p.k_scale ? p.softmax_scale * p.k_scale[tile.head] : p.softmax_scale;
    return scale * (p.row_scale.data ? p.row_scale.of(tile.batch, at) : 1.0f);
  }
  // Calls visit(i, row, head) for row first + i of as many as a vector has, without the divisions
  // above: two for every row take longer than to copy it.
  template <typename Visit>
  void each_of_vector(int64_t first, const Visit& visit) const {
    int64_t token = this->token(first), head = first % heads;
    for (int64_t i = 0; i < smaller(kFloats, count - first); ++i) {
      visit(i, token, tile.head * heads + head);
      if (++head == heads) head = 0, ++token;
    }
  }
};

// The keys of one region that a slice of rows sees: [first, last) at all, [full_first, full_last)
// by every row. Positions rise with the rows, so both are read off the slice's ends.
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
// to end, every row of it those from full_begin to full_end.
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

// Per row: the first key it sees in a region and the first one behind.
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

// ----------------------------------------------------------------------------------------------
// Packing

// Of one token; nullptr where rows are not rotated.
struct RowCosSin {
  const float *cos, *sin;
};

inline RowCosSin cos_sin_at(const CosSin& x, int64_t batch, int64_t token) {
  if (!x.cos) return {nullptr, nullptr};
  const int64_t at = batch * x.batch + token * x.seq;
  return {x.cos + at, x.sin + at};
}

// Calls run(x) with a value of the element type of keys or values, T but for those in e4m3.
template <typename T, typename Run>
inline void with_rows(const AttentionTensor& x, const Run& run) {
  if (x.is_e4m3) return run(e4m3{});
  run(T{});
}

// Calls run(x) with a value of out's element type, T or float.
template <typename T, typename Run>
inline void with_out(const AttentionParams& p, const Run& run) {
  if (p.float32_out) return run(float{});
  run(T{});
}

// A row that is rotated is rounded to its type thereafter, as a rotated tensor would be; one in
// e4m3 is rotated in float alone.
template <typename T>
inline void read_row(const AttentionParams& p, const T* from, int64_t dim, RowCosSin by,
                     float* to) {
  if (!by.cos) return widen_row(from, dim, to);
  rotate_row({dim, p.half, p.interleaved}, from, by.cos, by.sin, 1.0f, to);
  if constexpr (sizeof(T) == 2) {
    T rounded[kMaxHeadDim];
    narrow_row(to, dim, rounded);
    widen_row(rounded, dim, to);
  }
}

// Rotates a row of gradients back.
inline void unrotate_row(const AttentionParams& p, const float* from, RowCosSin by, float* to) {
  rotate_row({p.head_dim, p.half, p.interleaved}, from, by.cos, by.sin, -1.0f, to);
}

// Some keys in a head of k or v; rows past the last one count as zero.
struct KeyBlock {
  int64_t first, count, padded;
};

inline int64_t key_offset(const BlockRows& block, const AttentionTensor& x, int64_t key) {
  return block.tile.batch * x.batch + x.at(block.tile.first_k + key) + block.tile.head * x.head;
}

template <typename T>
inline const T* key_row(const BlockRows& block, const AttentionTensor& x, int64_t key) {
  return static_cast<const T*>(x.data) + key_offset(block, x, key);
}

// (padded, head_dim)
template <typename T>
inline void pack_rows(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
                      const KeyBlock& key_block, float* to) {
  const int64_t dim = x.head_dim;
  for (int64_t i = 0; i < key_block.count; ++i) {
    const int64_t key = key_block.first + i;
    read_row(block.p, key_row<T>(block, x, key), dim,
             cos_sin_at(cos_sin, block.tile.batch, block.tile.first_k + key), to + i * dim);
  }
  std::memset(to + key_block.count * dim, 0,
              (key_block.padded - key_block.count) * dim * sizeof(float));
}

// Fetches the share of one slice out of `slices` of the keys first..first+count-1, while the slice
// is at work on those before: rows of one head are too short and too far apart for the processor
// to see where they lead.
template <typename T>
inline void prefetch_share(const BlockRows& block, const AttentionTensor& x, int64_t first,
                           int64_t count, int64_t slice) {
  const int64_t element = x.is_e4m3 ? 1 : sizeof(T);
  const int64_t begin = count * slice / block.slices, end = count * (slice + 1) / block.slices;
  for (int64_t i = begin; i < end; ++i) {
    const char* from = static_cast<const char*>(x.data) + key_offset(block, x, first + i) * element;
    const int64_t bytes = x.head_dim * element;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// (head_dim / kRows, padded, kRows): the transposed matrix as the left factor of a product. Written
// a cache line at a time: the lines of different d fall into the same set of the cache.
inline void pack_columns(const float* rows, int64_t dim, int64_t padded, float* to) {
  constexpr int64_t kLine = 16 / kRows;  // keys
  for (int64_t i = 0; i < padded; i += kLine) {
    for (int64_t d = 0; d < dim; d += kRows) {
      float* line = to + d * padded + i * kRows;
#pragma GCC unroll 16
      for (int64_t key = 0; key < kLine; ++key) {
        std::memcpy(line + key * kRows, rows + (i + key) * dim + d, kRows * sizeof(float));
      }
    }
  }
}

template <typename T>
inline void read_query(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
                       int64_t token, int64_t head, float* to) {
  const T* from = static_cast<const T*>(x.data) + block.offset(x, token, head);
  const RowCosSin by = cos_sin_at(cos_sin, block.tile.batch, block.tile.first_q + token);
  read_row(block.p, from, x.head_dim, by, to);
}

// As many rows as a vector has elements.
using RowBuffer = float[kFloats][kMaxHeadDim + kFloats];

// (slices, head_dim, kSlice), the rows past the last one zero.
template <typename T>
inline void pack_slices(const BlockRows& block, const AttentionTensor& x, const CosSin& cos_sin,
                        const float* scale, float* to) {
  const int64_t dim = x.head_dim;
  RowBuffer rows = {};
  for (int64_t first = 0; first < block.slices * kSlice; first += kFloats) {
    if (first + kFloats > block.count) std::memset(rows, 0, sizeof(rows));
    block.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      read_query<T>(block, x, cos_sin, token, head, rows[i]);
    });
    float* columns = to + first / kSlice * dim * kSlice + first % kSlice;
    const floats factor = load<floats>(scale + first);
    for (int64_t d = 0; d < dim; d += kFloats) {
      words square[kFloats];
      for (int64_t i = 0; i < kFloats; ++i) square[i] = load<words>(rows[i] + d);
      transpose(square);
      for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
        store(columns + (d + i) * kSlice, bits_as<floats>(square[i]) * factor);
      }
    }
  }
}

// The rows from `first` on out of what pack_slices makes.
inline void unpack_rows(const float* from, int64_t first, int64_t dim, const float* scale,
                        RowBuffer& rows) {
  const float* columns = from + first / kSlice * dim * kSlice + first % kSlice;
  const floats factor = load<floats>(scale + first);
  for (int64_t d = 0; d < dim; d += kFloats) {
    words square[kFloats] = {};
    for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
      square[i] = bits_as<words>(load<floats>(columns + (d + i) * kSlice) * factor);
    }
    transpose(square);
    for (int64_t i = 0; i < kFloats; ++i) store(rows[i] + d, square[i]);
  }
}

}  // namespace
}  // namespace extrope
