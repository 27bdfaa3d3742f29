// Packs the operands of a chunk: rows as floats, permuted and mapped, and the columns of k.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/linear_attention/chunk.h"
#include "cpu/permute/dims.h"
#include "cpu/runtime/token.h"
#include "cpu/simd/transpose.h"

namespace extrope {
namespace {

template <typename T>
using WordOf = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

inline floats feature(floats v) { return (v < floats{} ? floats{} : v) + kFeatureEps; }

// A row as floats, zero behind dim.
template <bool Phi, typename T>
void pack_row(const T* from, int64_t dim, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats) {
    const floats v = load_wide(from + d);
    store(to + d, Phi ? feature(v) : v);
  }
  for (; d < dim; ++d) to[d] = Phi ? feature(floats{} + widen(from[d]))[0] : widen(from[d]);
  for (; d < padded; ++d) to[d] = 0.0f;
}

// The dims that each of the chunk's tokens takes of q and k.
template <typename T>
void find_sources(const Chunk& c) {
  using Word = WordOf<T>;
  const int64_t dim = c.p.score_dim, row = c.first_head(c.p.k.heads);
  const Powers<Word> powers(*c.p.cycles, row, dim, static_cast<Word*>(c.s.step));
  Word *last = nullptr, *sources = static_cast<Word*>(c.s.sources);
  uint64_t before = 0;
  for (int64_t i = 0; i < c.count; ++i, last = sources, sources += dim) {
    const uint64_t position = locate<uint64_t>(*c.p.permute, c.part.batch, c.token(i)).position;
    powers.find(position, before, last, sources);
    before = position;
  }
}

// Rows of x as floats, `stride` apart, zero past the chunk's last row up to `padded`.
template <bool Phi, typename T>
void pack_rows(const Chunk& c, const ScanTensor& x, int64_t head, int64_t dim, int64_t stride,
               int64_t padded, float* to) {
  const Rows<const T> rows = c.rows_of<const T>(x, head);
  for (int64_t i = 0; i < c.count; ++i) pack_row<Phi>(rows[i], dim, stride, to + i * stride);
  std::memset(to + c.count * stride, 0, (padded - c.count) * stride * sizeof(float));
}

// As pack_rows with Phi, by the dims that find_sources found.
template <typename T>
void pack_permuted(const Chunk& c, const ScanTensor& x, int64_t head, int64_t padded, float* to) {
  using Word = WordOf<T>;
  const int64_t dim = c.p.score_dim, stride = c.n.key_stride;
  const Rows<const T> rows = c.rows_of<const T>(x, head);
  const Word* sources = static_cast<const Word*>(c.s.sources);
  Word* permuted = static_cast<Word*>(c.s.permuted);
  const Gather<Word> gather = choose_gather<Word>(dim);
  for (int64_t i = 0; i < c.count; ++i) {
    gather(reinterpret_cast<const Word*>(rows[i]), sources + i * dim, permuted, dim);
    pack_row<true>(reinterpret_cast<const T*>(permuted), dim, stride, to + i * stride);
  }
  std::memset(to + c.count * stride, 0, (padded - c.count) * stride * sizeof(float));
}

// Rows of q or k, with their extra numbers behind the dims.
template <typename T>
void pack_scored(const Chunk& c, const ScanTensor& x, const RowNumbers& extra, int64_t head,
                 int64_t padded, float* to) {
  const int64_t dim = c.p.score_dim, stride = c.n.key_stride;
  if (c.p.permute) {
    pack_permuted<T>(c, x, head, padded, to);
  } else if (c.p.phi_scores) {
    pack_rows<true, T>(c, x, head, dim, stride, padded, to);
  } else {
    pack_rows<false, T>(c, x, head, dim, stride, padded, to);
  }
  if (!c.p.extra) return;
  for (int64_t i = 0; i < c.count; ++i) {
    to[i * stride + dim] = extra.data ? *c.number(extra, head, i) : 1.0f;
  }
}

template <typename T>
void pack_q(const Chunk& c, int64_t head) {
  pack_scored<T>(c, c.p.q, c.p.q_extra, head, c.rows, c.s.q);
}

template <typename T>
void pack_kv(const Chunk& c, int64_t head) {
  pack_scored<T>(c, c.p.k, c.p.k_extra, head, c.columns, c.s.k);
  const auto pack_v = c.p.phi_scores ? pack_rows<false, T> : pack_rows<true, T>;
  pack_v(c, c.p.v, head, c.p.value_dim, c.n.value_stride, c.count, c.s.v);
  for (int64_t i = 0; c.p.k_scale.data && i < c.count; ++i) {
    const floats scale = broadcast(*c.number(c.p.k_scale, head, i));
    float* row = c.s.k + i * c.n.key_stride;
    for (int64_t d = 0; d < c.n.key_dim; d += kFloats)
      store(row + d, load<floats>(row + d) * scale);
  }
}

inline void pack_columns(const Chunk& c) {
  for (int64_t j = 0; j < c.columns; j += kFloats) {
    for (int64_t d = 0; d < c.n.depth; d += kFloats) {
      words rows[kFloats];
      for (int i = 0; i < kFloats; ++i) rows[i] = load<words>(c.s.k + (j + i) * c.n.key_stride + d);
      transpose(rows);
      for (int i = 0; i < kFloats; ++i) store(c.s.k_columns + (d + i) * kChunk + j, rows[i]);
    }
  }
}

}  // namespace
}  // namespace extrope
