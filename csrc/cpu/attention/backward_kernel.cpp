// Backward of the attention over regions on the CPU. Compiled once per instruction set, with
// EXTROPE_ISA as its name.
//
// A tile of query rows takes the keys of each region block by block. It computes scores and their
// gradients once, and adds to dq (its own) and to dk and dv (in memory; tiles add in the order of
// their rows).

#include <algorithm>
#include <numeric>

#include "cpu/attention/backward_rows.h"
#include "cpu/simd/softmax.h"

namespace extrope {
namespace {

constexpr int64_t kTileFloats = 36864;  // of rows times head_dim
constexpr int64_t kMaxBlockM = 384, kBlockN = 96;
constexpr int64_t kKeyBlock = std::lcm(kRows, kTallRows);

struct Backward {
  Backward(const AttentionParams& p, const TilePlan& plan, float* begin)
      : space(begin), rows(space, rows_of(p, plan)) {
    const int64_t block = rows_of(p, plan);
    const int64_t wide = round_up(p.head_dim, kWide), value_wide = round_up(p.v.head_dim, kWide);
    q = space.take(block * p.head_dim);
    dout = space.take(block * p.v.head_dim);
    dq = space.take(block * p.head_dim);
    q_rows = space.take(block * wide);
    dout_rows = space.take(block * value_wide);
    keys = space.take(plan.block_n * p.head_dim);
    key_columns = space.take(plan.block_n * p.head_dim);
    values = space.take(plan.block_n * p.v.head_dim);
    key_sums = space.take(plan.block_n * greater(wide, value_wide));
    scores = space.take(plan.block_n * block);
    dscores = space.take(plan.block_n * block);
    seen = reinterpret_cast<int32_t*>(space.take(2 * block / kSlice));
    unit_scale = space.take(block);
  }
  Workspace space;
  RowValues rows;
  // head_dim here is that of each tensor.
  float *q, *dout, *dq;       // (slices, head_dim, kSlice)
  float *q_rows, *dout_rows;  // (head_dim / kWide, rows, kWide)
  float *keys, *values;       // (keys, head_dim)
  float* key_sums;            // (keys, head_dim rounded up to kWide)
  float* key_columns;         // (head_dim / kRows, keys, kRows)
  float *scores, *dscores;    // (slices, keys, kSlice)
  int32_t* seen;              // (slices, 2): the keys of a block that a slice sees
  float* unit_scale;          // (block,), all 1: dout is packed unscaled
};

struct SliceView {
  const float *q, *dout, *lse, *delta;
  float *dq, *scores, *dscores;
  float softcap;  // to base 2
};

SliceView slice_view(const BlockRows& block, const Backward& w, int64_t slice,
                     int64_t padded_keys) {
  const AttentionParams& p = block.p;
  const int64_t square = slice * p.head_dim * kSlice, at = slice * padded_keys * kSlice;
  return {.q = w.q + square,
          .dout = w.dout + slice * p.v.head_dim * kSlice,
          .lse = w.rows.lse + slice * kSlice,
          .delta = w.rows.delta + slice * kSlice,
          .dq = w.dq + square,
          .scores = w.scores + at,
          .dscores = w.dscores + at,
          .softcap = p.softcap * kLog2E};
}

// Caps logits, and writes the slopes of the cap, which are factors of their gradients.
EXTROPE_INLINE void cap_block(Sums<kRows, kSliceVectors>& sums, float softcap, float* slopes) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    cap(sums.at[i], 1.0f);
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const floats share = sums.at[i][j];
      store(slopes + i * kSlice + j * kFloats, 1.0f - share * share);
      sums.at[i][j] = share * softcap;
    }
  }
}

// Computes probabilities of the blocks of one slice from scores and lse. With a cap, writes its
// slopes to the place of the scores' gradients.
template <bool Masked, bool Capped>
EXTROPE_INLINE void probability_blocks(const SliceView& v, const float* keys, int64_t dim,
                                       int64_t begin, int64_t end, const RowKeys& visible,
                                       int64_t first) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kSliceVectors> sums{};
    multiply_add(sums, keys + key * dim, dim, 1, v.q, kSlice, dim);
    if constexpr (Capped) cap_block(sums, v.softcap, v.dscores + key * kSlice);
    if constexpr (Masked) mask_block(sums, visible, first + key);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kSliceVectors; ++j) {
        sums.at[i][j] = exp2_vector(sums.at[i][j] - load<floats>(v.lse + j * kFloats));
      }
    }
    store_sums(sums, v.scores + key * kSlice, kSlice);
  }
}

// Computes gradients of the scores: probability * (<dout, value> - delta).
template <bool Capped>
void gradient_blocks(const SliceView& v, const float* values, int64_t dim, int64_t begin,
                     int64_t end) {
  for (int64_t key = begin; key < end; key += kRows) {
    Sums<kRows, kSliceVectors> sums{};
    multiply_add(sums, values + key * dim, dim, 1, v.dout, kSlice, dim);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kSliceVectors; ++j) {
        const floats probability = load<floats>(v.scores + (key + i) * kSlice + j * kFloats);
        sums.at[i][j] = probability * (sums.at[i][j] - load<floats>(v.delta + j * kFloats));
        if constexpr (Capped) {
          sums.at[i][j] *= load<floats>(v.dscores + (key + i) * kSlice + j * kFloats);
        }
      }
    }
    store_sums(sums, v.dscores + key * kSlice, kSlice);
  }
}

// sum_rows reads the slice's keys in blocks of kTallRows: clears the rest of each block.
void clear_unseen(const SliceView& v, const SliceBlocks& blocks) {
  const int64_t before = blocks.begin % kTallRows, end = round_up(blocks.end, kTallRows);
  for (float* x : {v.scores, v.dscores}) {
    std::memset(x + (blocks.begin - before) * kSlice, 0, before * kSlice * sizeof(float));
    std::memset(x + blocks.end * kSlice, 0, (end - blocks.end) * kSlice * sizeof(float));
  }
}

template <bool Capped>
void visit_slice(const BlockRows& block, const Backward& w, int64_t slice, int64_t region,
                 const KeyBlock& key_block) {
  const int64_t dim = block.p.head_dim;
  const SliceView v = slice_view(block, w, slice, key_block.padded);
  SliceBlocks b = slice_blocks(slice_keys(block, slice, region), key_block.first, key_block.count);
  if (b.begin >= b.end) b = {0, 0, 0, 0};
  w.seen[2 * slice] = static_cast<int32_t>(b.begin);
  w.seen[2 * slice + 1] = static_cast<int32_t>(b.end);
  if (b.begin == b.end) return;
  clear_unseen(v, b);
  RowKeys visible;
  if (b.has_shared()) visible = row_keys(block, slice, region);
  const int64_t first = key_block.first;
  probability_blocks<true, Capped>(v, w.keys, dim, b.begin, b.full_begin, visible, first);
  probability_blocks<false, Capped>(v, w.keys, dim, b.full_begin, b.full_end, visible, first);
  probability_blocks<true, Capped>(v, w.keys, dim, b.full_end, b.end, visible, first);
  gradient_blocks<Capped>(v, w.values, block.p.v.head_dim, b.begin, b.end);
  for (int64_t d = 0; d < dim; d += kRows) {
    Sums<kRows, kSliceVectors> sums;
    load_sums(sums, v.dq + d * kSlice, kSlice);
    multiply_add(sums, w.key_columns + d * key_block.padded + b.begin * kRows, 1, kRows,
                 v.dscores + b.begin * kSlice, kSlice, b.end - b.begin);
    store_sums(sums, v.dq + d * kSlice, kSlice);
  }
}

void write_dq(const BlockRows& block, const Backward& w, int64_t region) {
  RowBuffer rows;
  for (int64_t row = 0; row < block.count; ++row) {
    if (row % kFloats == 0) unpack_rows(w.dq, row, block.p.head_dim, w.rows.scale, rows);
    write_dq_row(block, region, row, rows[row % kFloats]);
  }
}

template <typename T>
void backward_region(const BlockRows& block, const TilePlan& plan, const Backward& w,
                     int64_t region, KeysDone* previous, KeysDone* done) {
  const AttentionParams& p = block.p;
  const auto visit = p.softcap > 0 ? visit_slice<true> : visit_slice<false>;
  std::memset(w.dq, 0, block.slices * kSlice * p.head_dim * sizeof(float));
  const SliceKeys keys = tile_keys(block, region);
  if (keys.first < keys.last) {
    pack_slices<T>(block, p.q, p.q_cos_sin[region], w.rows.logit_scale, w.q);
    pack_wide<T>(block, p.q, p.q_cos_sin[region], w.rows.scale, w.q_rows);
  }
  for (int64_t first = keys.first; first < keys.last; first += plan.block_n) {
    const int64_t count = smaller(plan.block_n, keys.last - first);
    const KeyBlock key_block{first, count, round_up(count, kKeyBlock)};
    pack_rows<T>(block, p.v, {}, key_block, w.values);
    pack_rows<T>(block, p.k[region], p.k_cos_sin[region], key_block, w.keys);
    pack_columns(w.keys, p.head_dim, key_block.padded, w.key_columns);
    const int64_t next = first + count, next_count = smaller(plan.block_n, keys.last - next);
    for (int64_t slice = 0; slice < block.slices; ++slice) {
      prefetch_share<T>(block, p.k[region], next, next_count, slice);
      prefetch_share<T>(block, p.v, next, next_count, slice);
      prefetch_share<float>(block, p.dk, first, count, slice);
      prefetch_share<float>(block, p.dv, first, count, slice);
      visit(block, w, slice, region, key_block);
    }
    sum_rows(block, key_block, w.seen, w.scores, w.dout_rows, p.v.head_dim, w.key_sums);
    wait_for_keys(previous, first + count);
    add_keys(block, key_block, {}, w.key_sums, p.dv);
    sum_rows(block, key_block, w.seen, w.dscores, w.q_rows, p.head_dim, w.key_sums);
    add_keys(block, key_block, p.k_cos_sin[region], w.key_sums, p.dk);
    done->store(smaller(first + count, next_key(block, region + 1)), std::memory_order_release);
  }
  write_dq(block, w, region);
}

template <typename T>
void backward(const BlockRows& block, const TilePlan& plan, const Backward& w, KeysDone* previous,
              KeysDone* done) {
  load_row_values<T>(block, w.rows);
  std::fill_n(w.unit_scale, block.slices * kSlice, 1.0f);
  pack_slices<T>(block, block.p.dout, {}, w.unit_scale, w.dout);
  pack_wide<T>(block, block.p.dout, {}, w.unit_scale, w.dout_rows);
  for (int64_t region = 0; region < block.p.regions.count; ++region) {
    backward_region<T>(block, plan, w, region, previous, done);
  }
  wait_for_keys(previous, kAllKeys);
  done->store(kAllKeys, std::memory_order_release);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_backward_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t rows = kTileFloats / greater(p.head_dim, p.v.head_dim);
  const int64_t block = greater(smaller(rows, kMaxBlockM) / kSlice, 1) * kSlice;
  plan.tokens = tile_rows(p, block);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kKeyBlock));
  plan.workspace = Backward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_backward_tile_, EXTROPE_ISA)(const AttentionParams& p,
                                                           const QueryTile& tile,
                                                           const TilePlan& plan, float* workspace,
                                                           KeysDone* previous, KeysDone* done) {
  const BlockRows block{p, tile};
  const Backward w(p, plan, workspace);
  switch (p.dtype) {
    case DType::bf16:
      return backward<bf16>(block, plan, w, previous, done);
    case DType::f16:
      return backward<f16>(block, plan, w, previous, done);
    default:
      return backward<float>(block, plan, w, previous, done);
  }
}

}  // namespace extrope
