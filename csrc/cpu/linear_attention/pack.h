// Packs the operands of a chunk: rows as floats, permuted and mapped, and the columns of y.
#pragma once

#include "cpu/linear_attention/powers.h"

namespace extrope {
namespace {

// Rows of x as floats, `step` apart, zero past dim and past the chunk's last row.
template <bool Phi, bool Permuted, typename T>
void pack_rows(const Part& part, const Chunk& chunk, const SweepTensor& x, int64_t head,
               int64_t dim, int64_t step, int64_t padded, float* to) {
  using Word = WordOf<T>;
  const Walk<const T> rows = part.template walk<const T>(x, head, chunk.first);
  const Word* lanes = static_cast<const Word*>(part.s.powers);
  [[maybe_unused]] const auto take = choose_taking<T>(dim);
  for (int64_t i = 0; i < chunk.count; ++i) {
    if constexpr (Permuted) {
      take(rows[i], lanes + i * dim, part.s.permuted, dim, step, to + i * step);
    } else {
      pack_row<Phi>(rows[i], dim, step, to + i * step);
    }
  }
  std::memset(to + chunk.count * step, 0, (padded - chunk.count) * step * sizeof(float));
}

template <typename T>
void pack(const Part& part, const Chunk& chunk, const SweepTensor& x, int64_t head, int64_t dim,
          bool phi, int64_t step, int64_t padded, float* to) {
  phi ? pack_rows<true, false, T>(part, chunk, x, head, dim, step, padded, to)
      : pack_rows<false, false, T>(part, chunk, x, head, dim, step, padded, to);
}

// x or y: only where phi is applied to them are they permuted here.
template <typename T>
void pack_scored(const Part& part, const Chunk& chunk, const SweepTensor& x, int64_t head,
                 int64_t padded, float* to) {
  const SweepParams& p = part.p;
  p.permute
      ? pack_rows<true, true, T>(part, chunk, x, head, p.score_dim, part.n.lane_step, padded, to)
      : pack<T>(part, chunk, x, head, p.score_dim, p.phi_scores, part.n.lane_step, padded, to);
}

// Puts the extra numbers behind the lanes of each row.
inline void pack_extra(const Part& part, const Chunk& chunk, const RowNumbers& numbers,
                       int64_t head, float* to) {
  for (int64_t i = 0; i < chunk.count; ++i) {
    to[i * part.n.lane_step + part.p.score_dim] =
        numbers.data ? *part.number(numbers, head, chunk.first + i) : 1.0f;
  }
}

inline void scale_row(float* row, int64_t count, float factor) {
  for (int64_t d = 0; d < count; d += kFloats) {
    store(row + d, load<floats>(row + d) * broadcast(factor));
  }
}

template <typename T>
void pack_x(const Part& part, const Chunk& chunk, int64_t head) {
  const SweepParams& p = part.p;
  pack_scored<T>(part, chunk, p.x, head, chunk.rows, part.s.x);
  if (p.extra) pack_extra(part, chunk, p.x_extra, head, part.s.x);
}

template <typename T>
void pack_yw(const Part& part, const Chunk& chunk, int64_t head) {
  const SweepParams& p = part.p;
  pack_scored<T>(part, chunk, p.y, head, chunk.lanes, part.s.y);
  pack<T>(part, chunk, p.w, head, p.value_dim, !p.phi_scores, part.n.row_step, chunk.count,
          part.s.w);
  if (p.extra) pack_extra(part, chunk, p.y_extra, head, part.s.y);
  if (p.y_scale.data) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      const float scale = *part.number(p.y_scale, head, chunk.first + i);
      scale_row(part.s.y + i * part.n.lane_step, part.n.lanes, scale);
    }
  }
}

// Each step deals two halves of the vectors out like cards; after log2 of them rows are columns.
inline void transpose(floats (&v)[kFloats]) {
#pragma GCC unroll 4
  for (int done = 1; done < kFloats; done *= 2) {
    floats dealt[kFloats];
#pragma GCC unroll 16
    for (int i = 0; i < kFloats / 2; ++i) {
      const auto [low, high] =
          zip(v[i], v[i + kFloats / 2], std::make_integer_sequence<int, kFloats>{});
      dealt[2 * i] = low;
      dealt[2 * i + 1] = high;
    }
    std::memcpy(v, dealt, sizeof(v));
  }
}

inline void pack_columns(const Part& part, const Chunk& chunk) {
  for (int64_t j = 0; j < chunk.lanes; j += kFloats) {
    for (int64_t d = 0; d < part.n.depth; d += kFloats) {
      floats v[kFloats];
      for (int i = 0; i < kFloats; ++i) {
        v[i] = load<floats>(part.s.y + (j + i) * part.n.lane_step + d);
      }
      transpose(v);
      for (int i = 0; i < kFloats; ++i) store(part.s.y_columns + (d + i) * kChunk + j, v[i]);
    }
  }
}

}  // namespace
}  // namespace extrope
