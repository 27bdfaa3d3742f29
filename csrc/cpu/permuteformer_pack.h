// Packs the operands of a chunk: rows as floats, permuted and mapped, and the columns of y.
#pragma once

#include <algorithm>
#include <type_traits>

#include "permute_lanes.h"
#include "permuteformer_tile.h"
#include "token.h"

namespace extrope {
namespace {

inline floats feature(floats v) { return (v < floats{} ? floats{} : v) + kFeatureEps; }

// Rows of one head are too short and too far apart for the processor to see where they lead.
template <typename T>
void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + d, 0, 2);
  }
}

template <typename T>
using WordOf = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// The lanes that each of the chunk's tokens takes: one step more than the last one's.
template <typename T>
void take_powers(const Part& part, const Chunk& chunk) {
  using Word = WordOf<T>;
  const SweepParams& p = part.p;
  const int64_t dim = p.score_dim, row = first_head(p, part.part, p.y.heads);
  Word *step = static_cast<Word*>(part.s.step), *lanes = static_cast<Word*>(part.s.powers);
  std::copy_n(p.cycles->step + row * dim, dim, step);
  const Gather<Word> gather = choose_gather<Word>(dim);
  uint64_t before = 0;
  for (int64_t i = 0; i < chunk.count; ++i, lanes += dim) {
    const int64_t seq = part.token(chunk.first + i);
    const uint64_t position = locate<uint64_t>(*p.permute, part.part.batch, seq).position;
    if (i > 0 && follows(position, before)) {
      gather(step, lanes - dim, lanes, dim);
    } else {
      power_lanes(*p.cycles, row, dim, static_cast<int64_t>(position), lanes);
    }
    before = position;
  }
}

template <bool Phi, typename T>
void pack_row(const T* from, int64_t dim, int64_t step, float* to) {
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats) {
    const floats v = load_wide(from + d);
    store(to + d, Phi ? feature(v) : v);
  }
  for (; d < dim; ++d) to[d] = Phi ? feature(floats{} + widen(from[d]))[0] : widen(from[d]);
  for (; d < step; ++d) to[d] = 0.0f;
}

// Rows of x as floats, `step` apart, zero past dim and past the chunk's last row.
template <bool Phi, bool Permuted, typename T>
void pack_rows(const Part& part, const Chunk& chunk, const SweepTensor& x, int64_t head,
               int64_t dim, int64_t step, int64_t padded, float* to) {
  using Word = WordOf<T>;
  const int64_t h = first_head(part.p, part.part, x.heads) + head;
  const Gather<Word> gather = choose_gather<Word>(dim);
  const Word* lanes = static_cast<const Word*>(part.s.powers);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const T* from = static_cast<const T*>(x.data) + part.offset(x, h, chunk.first + i);
    if (h + 1 < x.heads) prefetch_row(from + x.head, dim);  // the next to be packed
    if constexpr (Permuted) {
      Word* permuted = static_cast<Word*>(part.s.permuted);
      gather(reinterpret_cast<const Word*>(from), lanes + i * dim, permuted, dim);
      from = reinterpret_cast<const T*>(permuted);
    }
    pack_row<Phi>(from, dim, step, to + i * step);
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
  p.permute ? pack_rows<true, true, T>(part, chunk, x, head, p.score_dim, part.n.lanes, padded, to)
            : pack<T>(part, chunk, x, head, p.score_dim, p.phi_scores, part.n.lanes, padded, to);
}

// Puts the extra numbers behind the lanes of each row.
inline void pack_extra(const Part& part, const Chunk& chunk, const RowNumbers& numbers,
                       int64_t head, float* to) {
  for (int64_t i = 0; i < chunk.count; ++i) {
    to[i * part.n.lanes + part.p.score_dim] =
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
  const int64_t out_head = first_head(p, part.part, p.out.heads) + head;
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t at = part.offset(p.out, out_head, chunk.first + i);
    p.out_is_float ? prefetch_row(static_cast<const float*>(p.out.data) + at, p.value_dim)
                   : prefetch_row(static_cast<const T*>(p.out.data) + at, p.value_dim);
  }
}

template <typename T>
void pack_yw(const Part& part, const Chunk& chunk, int64_t head) {
  const SweepParams& p = part.p;
  pack_scored<T>(part, chunk, p.y, head, chunk.lanes, part.s.y);
  pack<T>(part, chunk, p.w, head, p.value_dim, !p.phi_scores, part.n.wide, chunk.count, part.s.w);
  if (p.extra) pack_extra(part, chunk, p.y_extra, head, part.s.y);
  if (p.y_scale.data) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      const float scale = *part.number(p.y_scale, head, chunk.first + i);
      scale_row(part.s.y + i * part.n.lanes, part.n.lanes, scale);
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
        v[i] = load<floats>(part.s.y + (j + i) * part.n.lanes + d);
      }
      transpose(v);
      for (int i = 0; i < kFloats; ++i) store(part.s.y_columns + (d + i) * kChunk + j, v[i]);
    }
  }
}

}  // namespace
}  // namespace extrope
