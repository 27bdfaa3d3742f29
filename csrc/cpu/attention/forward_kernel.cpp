// Forward of the attention over regions on the CPU. Compiled once per instruction set, with
// EXTROPE_ISA as its name.
//
// A tile of query rows takes the keys block by block and keeps a running row_max and row_sum. Every
// slice of rows has its own range of a block's keys. So masks are needed only in the few parts of
// kRows keys in which the rows of one slice disagree.

#include "cpu/attention/blocks.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

constexpr int64_t kBlockM = 768, kBlockN = 128;
// The running row_max starts here rather than at -inf, so that differences are never NaN.
constexpr float kLowest = -1e30f;

struct Forward {
  Forward(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t block = rows_of(p, plan);
    q = space.take(p.regions.count * block * p.head_dim);
    out = space.take(block * p.v.head_dim);
    keys = space.take(plan.block_n * greater(p.regions.count * p.head_dim, p.v.head_dim));
    values = space.take(plan.block_n * p.v.head_dim);
    scores = space.take(plan.block_n * kSlice);
    row_max = space.take(block);
    row_sum = space.take(block);
    scale = space.take(block);
  }
  Workspace space;
  float* q;                          // (regions, slices, head_dim, kSlice)
  float* out;                        // (slices, v's head_dim, kSlice)
  float* keys;                       // (regions, keys, head_dim); values too, before packing
  float* values;                     // (v's head_dim / kRows, keys, kRows)
  float* scores;                     // (keys, kSlice)
  float *row_max, *row_sum, *scale;  // (block,)
};

// A slice and the block of keys in one region that it works on.
struct SliceView {
  const float *q, *keys;
  int64_t dim, first;  // the block's first key
  float softcap;       // to base 2
};

EXTROPE_INLINE void cap_block(Sums<kRows, kSliceVectors>& sums, float softcap) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) cap(sums.at[i], softcap);
}

// Computes scores of parts that every row of a slice sees, or that it shares with other regions.
template <bool Shared, bool Capped>
EXTROPE_INLINE void score_blocks(const Forward& w, const SliceView& v, int64_t begin, int64_t end,
                                 const RowKeys& visible, int64_t written,
                                 floats (&row_max)[kSliceVectors]) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kSliceVectors> sums{};
    float* scores = w.scores + key * kSlice;
    multiply_add(sums, v.keys + key * v.dim, v.dim, 1, v.q, kSlice, v.dim);
    if constexpr (Capped) cap_block(sums, v.softcap);
    if constexpr (Shared) merge_block(sums, visible, v.first + key, key >= written, scores);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kSliceVectors; ++j) row_max[j] = larger(row_max[j], sums.at[i][j]);
    }
    store_sums(sums, scores, kSlice);
  }
}

// Computes a slice's scores in one region. Earlier regions have written those of the keys before
// `written`.
template <bool Capped>
void score_region(const BlockRows& block, const Forward& w, const SliceView& v, int64_t slice,
                  int64_t region, const SliceBlocks& b, int64_t written,
                  floats (&row_max)[kSliceVectors]) {
  RowKeys visible;
  if (b.has_shared()) visible = row_keys(block, slice, region);
  const int64_t shared[2][2] = {{b.begin, b.full_begin}, {b.full_end, b.end}};
  for (const auto& [begin, end] : shared) {
    score_blocks<true, Capped>(w, v, begin, end, visible, written, row_max);
  }
  score_blocks<false, Capped>(w, v, b.full_begin, b.full_end, visible, written, row_max);
}

// Turns scores into probabilities; returns the rescale factor of earlier sums.
EXTROPE_INLINE void softmax_block(const Forward& w, int64_t slice, const RegionBlocks& blocks,
                                  const floats (&row_max)[kSliceVectors],
                                  floats (&rescale)[kSliceVectors]) {
  floats sum[kSliceVectors];
  for (int j = 0; j < kSliceVectors; ++j) {
    const int64_t at = slice * kSlice + j * kFloats;
    rescale[j] = exp2_vector(load<floats>(w.row_max + at) - row_max[j]);
    sum[j] = load<floats>(w.row_sum + at) * rescale[j];
    store(w.row_max + at, row_max[j]);
  }
  for (int64_t key = blocks.begin; key < blocks.end; ++key) {
    float* scores = w.scores + key * kSlice;
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const floats e = exp2_vector(load<floats>(scores + j * kFloats) - row_max[j]);
      store(scores + j * kFloats, e);
      sum[j] += e;
    }
  }
  for (int j = 0; j < kSliceVectors; ++j) store(w.row_sum + slice * kSlice + j * kFloats, sum[j]);
}

template <bool Capped>
void visit_slice(const BlockRows& block, const TilePlan& plan, const Forward& w, int64_t slice,
                 const KeyBlock& key_block) {
  const RegionBlocks blocks(block, slice, key_block);
  if (blocks.begin >= blocks.end) return;
  const int64_t dim = block.p.head_dim, value_dim = block.p.v.head_dim;
  floats row_max[kSliceVectors], rescale[kSliceVectors];
  for (int j = 0; j < kSliceVectors; ++j) {
    row_max[j] = load<floats>(w.row_max + slice * kSlice + j * kFloats);
  }
  for (int64_t r = 0, written = 0; r < block.p.regions.count; ++r) {
    const SliceBlocks& b = blocks.of[r];
    if (b.begin >= b.end) continue;
    const SliceView v{w.q + (r * block.slices + slice) * dim * kSlice,
                      w.keys + r * plan.block_n * dim, dim, key_block.first,
                      block.p.softcap * kLog2E};
    score_region<Capped>(block, w, v, slice, r, b, written, row_max);
    written = b.end;
  }
  softmax_block(w, slice, blocks, row_max, rescale);
  for (int64_t d = 0; d < value_dim; d += kRows) {
    float* out = w.out + (slice * value_dim + d) * kSlice;
    Sums<kRows, kSliceVectors> sums;
    load_sums(sums, out, kSlice);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kSliceVectors; ++j) sums.at[i][j] *= rescale[j];
    }
    multiply_add(sums, w.values + d * key_block.padded + blocks.begin * kRows, 1, kRows,
                 w.scores + blocks.begin * kSlice, kSlice, blocks.end - blocks.begin);
    store_sums(sums, out, kSlice);
  }
}

// Divides by the sums of probabilities and writes out, of type T, and lse.
template <typename T>
void finish(const BlockRows& block, const Forward& w) {
  finish_sums(block, w.row_max, w.row_sum, w.scale);
  const AttentionTensor& x = block.p.out;
  RowBuffer rows;
  for (int64_t first = 0; first < block.count; first += kFloats) {
    unpack_rows(w.out, first, x.head_dim, w.scale, rows);
    block.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      narrow_row(rows[i], x.head_dim, static_cast<T*>(x.data) + block.offset(x, token, head));
    });
  }
}

template <typename T, bool Capped>
void forward(const BlockRows& block, const TilePlan& plan, const Forward& w) {
  const AttentionParams& p = block.p;
  const int64_t padded = block.slices * kSlice;
  const float unit = Capped ? 1.0f / p.softcap : kLog2E;
  std::memset(w.out, 0, padded * p.v.head_dim * sizeof(float));
  std::memset(w.row_sum, 0, padded * sizeof(float));
  for (int64_t row = 0; row < padded; ++row) {
    w.row_max[row] = kLowest;
    w.scale[row] = row < block.count ? block.scale(row) * unit : 0.0f;
  }
  const BlockKeys seen(block);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    if (!seen.sees(r)) continue;
    pack_slices<T>(block, p.q, p.q_cos_sin[r], w.scale, w.q + r * padded * p.head_dim);
  }
  for (int64_t first = seen.first; first < seen.last; first += plan.block_n) {
    const KeyBlock key_block = seen.key_block(first, plan.block_n);
    with_rows<T>(p.v,
                 [&](auto type) { pack_rows<decltype(type)>(block, p.v, {}, key_block, w.keys); });
    pack_columns(w.keys, p.v.head_dim, key_block.padded, w.values);
    for (int64_t r = 0; r < p.regions.count; ++r) {
      pack_part(seen, r, key_block, [&](const KeyBlock& part, int64_t offset) {
        with_rows<T>(p.k[r], [&](auto type) {
          pack_rows<decltype(type)>(block, p.k[r], p.k_cos_sin[r], part,
                                    w.keys + (r * plan.block_n + offset) * p.head_dim);
        });
      });
    }
    for (int64_t slice = 0; slice < block.slices; ++slice) {
      prefetch_block<T>(block, seen, first + plan.block_n, plan.block_n, slice);
      visit_slice<Capped>(block, plan, w, slice, key_block);
    }
  }
  with_out<T>(p, [&](auto type) { finish<decltype(type)>(block, w); });
}

template <typename T>
void forward(const BlockRows& block, const TilePlan& plan, const Forward& w) {
  if (block.p.softcap > 0) return forward<T, true>(block, plan, w);
  forward<T, false>(block, plan, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  plan.tokens = tile_rows(p, kBlockM);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kRows));
  plan.workspace = Forward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  const BlockRows block{p, tile};
  const Forward w(p, plan, workspace);
  switch (p.dtype) {
    case DType::bf16:
      return forward<bf16>(block, plan, w);
    case DType::f16:
      return forward<f16>(block, plan, w);
    default:
      return forward<float>(block, plan, w);
  }
}

}  // namespace extrope
