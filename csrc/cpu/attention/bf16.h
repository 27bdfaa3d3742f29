// Operands of the attention in bf16 tiles. See tile.h for rows, keys and slices.
#pragma once

#include "cpu/attention/blocks.h"

// Products of tiles by AMX or AVX512_BF16. The sums are 32 x 32 floats.
#if defined(__AMX_BF16__)
#include "cpu/simd/bf16_products_amx.h"
#else
#include "cpu/simd/bf16_products_avx512.h"
#endif

namespace extrope {
namespace {

constexpr int64_t kQueryTiles = kQueryLanes / kSide;
static_assert(kQueryTiles % 2 == 0 && kKeyRows == 2 * kSide && kKeyRows == kDepth &&
              kFloats == kSide);

inline int64_t dim_tiles_of(const AttentionTensor& x) { return (x.head_dim + kDepth - 1) / kDepth; }

inline bf16* take_values(Workspace& space, int64_t values) {
  return reinterpret_cast<bf16*>(space.take(values / 2));
}

// One value per row of a slice.
struct SliceValues {
  floats at[kQueryVectors];
};

// Merges a region's logits of `keys` keys from key `key` on: `product` if the row sees the key,
// else those of earlier regions, or `hidden_logit`.
inline void merge_region(const float* product, int64_t keys, const RowKeys seen, int64_t key,
                         bool is_first_region, const SliceValues hidden_logit, float* logits) {
  for (int i = 0; i < keys; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const int64_t at = i * kQueryLanes + j * kFloats;
      const ints sees = (here >= seen.begin[j]) & (here < seen.end[j]);
      const floats rest = is_first_region ? hidden_logit.at[j] : load<floats>(logits + at);
      store(logits + at, sees ? load<floats>(product + at) : rest);
    }
  }
}

// Rotates a row and rounds it. Subnormal numbers become zero.
inline void rotate_values(const RowRotation& row, const bf16* in, RowCosSin cos_sin, bf16* out) {
  const int64_t half = row.half;
  const float *cos = cos_sin.cos, *sin = cos_sin.sin;
  if (half % kFloats != 0) {
    float wide[kMaxHeadDim];
    rotate_to_float(row, in, cos, sin, 1.0f, wide);
    return narrow_row(wide, row.dim, out);
  }
  const int64_t first = row.rotary_offset, end = first + 2 * half;
  if (first > 0) std::memcpy(out, in, first * sizeof(bf16));
  if (end < row.dim) std::memcpy(out + end, in + end, (row.dim - end) * sizeof(bf16));
  in += first, out += first;
  for (int64_t i = 0; i < half; i += kFloats) {
    const floats c = load<floats>(cos + i), s = load<floats>(sin + i);
    if (row.interleaved) {
      const auto [a, b] = load_pairs(in + 2 * i);
      store(out + 2 * i, pair_values(a * c - b * s, b * c + a * s));
    } else {
      const floats a = load_wide(in + i), b = load_wide(in + half + i);
      store(out + i, _mm512_cvtneps_pbh(bits_as<__m512>(a * c - b * s)));
      store(out + half + i, _mm512_cvtneps_pbh(bits_as<__m512>(b * c + a * s)));
    }
  }
}

// kSide rows, in their tensor or rotated in a buffer.
struct QueryRows {
  const bf16* at[kSide];
  bf16 rotated[kSide][kMaxHeadDim + kDepth];  // so that rows use different sets of the cache
};

// Rotates the rows from `first` on, and prefetches the next ones meanwhile.
inline void read_queries(const TileQueries& queries, const AttentionTensor& x,
                         const CosSin& cos_sin, int64_t first, QueryRows& rows) {
  const AttentionParams& p = queries.p;
  const bf16* data = static_cast<const bf16*>(x.data);
  queries.each_of_vector(first + kSide, [&](int64_t, int64_t token, int64_t head) {
    const bf16* next = data + queries.offset(x, token, head);
    for (int64_t d = 0; d < x.head_dim; d += kDepth) __builtin_prefetch(next + d);
  });
  queries.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
    rows.at[i] = data + queries.offset(x, token, head);
    const RowCosSin row = cos_sin_at(queries, cos_sin, queries.tile.first_q + token);
    if (!row.cos) return;
    rotate_values(p.rotation, rows.at[i], row, rows.rotated[i]);
    rows.at[i] = rows.rotated[i];
  });
}

// Packs x transposed: (slices, dim / 32, kQueryTiles) right tiles of 16 rows.
inline void pack_query_pairs(const TileQueries& queries, const AttentionTensor& x,
                             const CosSin& cos_sin, bf16* to) {
  const int64_t dim = x.head_dim, dim_tiles = dim_tiles_of(x);
  QueryRows rows;
  for (int64_t first = 0; first < queries.slices * kQueryLanes; first += kSide) {
    read_queries(queries, x, cos_sin, first, rows);
    bf16* slice =
        to + first / kQueryLanes * dim_tiles * kQueryLanes * kDepth + first % kQueryLanes * kDepth;
    for (int64_t d = 0; d < dim_tiles; ++d) {
      words tile[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) {
        tile[i] = first + i < queries.count ? load_values(rows.at[i] + d * kDepth, dim - d * kDepth)
                                            : words{};
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i)
        store(slice + d * kQueryLanes * kDepth + i * kDepth, tile[i]);
    }
  }
}

// Splits two rows of 32 values into pairs of their first 16 dims, and pairs of the others.
inline void pair_rows(const words a, const words b, words& low, words& high) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i others = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  const __m512i x = bits_as<__m512i>(a), y = bits_as<__m512i>(b);
  low = bits_as<words>(_mm512_permutex2var_epi16(x, order, y));
  high = bits_as<words>(_mm512_permutex2var_epi16(x, others, y));
}

// Packs x: (rows / 32, dim / 16) right tiles; rows past the last one are zero.
inline void pack_row_pairs(const TileQueries& queries, const AttentionTensor& x,
                           const CosSin& cos_sin, bf16* to) {
  const int64_t dim = x.head_dim, dim_tiles = dim_tiles_of(x);
  QueryRows rows;
  for (int64_t first = 0; first < queries.slices * kQueryLanes; first += kSide) {
    read_queries(queries, x, cos_sin, first, rows);
    bf16* tiles = to + first / kDepth * 2 * dim_tiles * kTileValues + first % kDepth * kSide;
    for (int64_t i = 0; i < kSide; i += 2) {
      for (int64_t d = 0; d < dim_tiles; ++d) {
        const auto values = [&](int64_t row) {
          return first + row < queries.count
                     ? load_values(rows.at[row] + d * kDepth, dim - d * kDepth)
                     : words{};
        };
        words low, high;
        pair_rows(values(i), values(i + 1), low, high);
        bf16* tile = tiles + 2 * d * kTileValues + i * kSide;
        store(tile, low);
        store(tile + kTileValues, high);
      }
    }
  }
}

// Packs the rows that `row(i)` points to: (keys / 16, dim / 32) left tiles, zero past the last key.
template <typename Row>
inline void pack_key_rows(const KeyBlock& key_block, int64_t dim, const Row& row, bf16* to) {
  const int64_t dim_tiles = (dim + kDepth - 1) / kDepth;
  for (int64_t key = 0; key < key_block.padded; ++key) {
    bf16* tiles = to + key / kSide * dim_tiles * kTileValues + key % kSide * kDepth;
    for (int64_t d = 0; d < dim_tiles; ++d) {
      store(tiles + d * kTileValues,
            key < key_block.count ? load_values(row(key) + d * kDepth, dim - d * kDepth) : words{});
    }
  }
}

// Packs those rows transposed: (dim / 16, keys / 32) left tiles.
template <typename Row>
inline void pack_key_columns(const KeyBlock& key_block, int64_t dim, const Row& row, bf16* to) {
  const int64_t key_tiles = key_block.padded / kDepth;
  for (int64_t key = 0; key < key_tiles; ++key) {
    for (int64_t d = 0; d < dim; d += kDepth) {
      words upper[kSide], lower[kSide];  // 16 dims each, pairs of keys
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t at = key * kDepth + 2 * i;
        const auto values = [&](int64_t k) {
          return k < key_block.count ? load_values(row(k) + d, dim - d) : words{};
        };
        pair_rows(values(at), values(at + 1), upper[i], lower[i]);
      }
      transpose(upper);
      transpose(lower);
      bf16* tile = to + (d / kSide * key_tiles + key) * kTileValues;
      for (int64_t i = 0; i < kSide; ++i) {
        store(tile + i * kDepth, upper[i]);
        store(tile + key_tiles * kTileValues + i * kDepth, lower[i]);
      }
    }
  }
}

// Undoes the transposition of a product: calls visit(i, d, sums) for 16 dims from d on of row first
// + i, from (slices, dim / 16, kQueryTiles) tiles of sums.
template <typename Visit>
inline void each_sum(const TileQueries& queries, const float* from, int64_t first, int64_t dim,
                     const Visit& visit) {
  const float* slice = from + first / kQueryLanes * round_up(dim, kDepth) * kQueryLanes +
                       first % kQueryLanes * kSide;
  for (int64_t d = 0; d < dim; d += kSide) {
    words rows[kSide];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i) rows[i] = load<words>(slice + d * kQueryLanes + i * kSide);
    transpose(rows);
    for (int64_t i = 0; i < smaller(kSide, queries.count - first); ++i) {
      visit(i, d, bits_as<floats>(rows[i]));
    }
  }
}

// Writes them to rows of x, of type T.
template <typename T>
void unpack_sums(const TileQueries& queries, const float* from, const float* scale,
                 const AttentionTensor& x) {
  const int64_t dim = x.head_dim;
  for (int64_t first = 0; first < queries.count; first += kSide) {
    T* to[kSide];
    queries.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      to[i] = static_cast<T*>(x.data) + queries.offset(x, token, head);
    });
    each_sum(queries, from, first, dim, [&](int64_t i, int64_t d, floats sums) {
      sums *= scale[first + i];
      if (d + kSide <= dim) return store_narrow(to[i] + d, sums);
      float values[kSide];
      store(values, sums);
      narrow_row(values, dim - d, to[i] + d);
    });
  }
}

}  // namespace
}  // namespace extrope
