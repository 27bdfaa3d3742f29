// A chunk of a sequence in a scan: sizes, scratch memory, the places of its rows, and its packed
// operands: rows as floats, permuted and mapped, and the columns of k.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/linear_attention/kernel.h"
#include "cpu/permute/dims.h"
#include "cpu/runtime/token.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/transpose.h"

namespace extrope {
namespace {

constexpr float kFeatureEps = 1e-3f;  // FEATURE_EPS of ops/permuteformer/scans.py
constexpr int64_t kChunk = 48;        // tokens
static_assert(kChunk % kTallRows == 0 && kChunk % kFloats == 0);
constexpr int64_t kFewRows = 4;  // of a state: a block of kTallRows would be mostly padding

// Avoids strides of 256 bytes, whose rows would share a few sets of the cache.
inline int64_t stride_of(int64_t floats) { return floats % 64 == 0 ? floats + kFloats : floats; }

// Padded sizes in floats.
struct Sizes {
  explicit Sizes(const ScanParams& p)
      : depth(p.score_dim + (p.extra ? 1 : 0)),
        tall_rows(depth / kTallRows * kTallRows),
        state_rows(tall_rows + round_up(depth - tall_rows, kFewRows)),
        key_dim(round_up(state_rows, kFloats)),
        value_dim(round_up(p.value_dim, kWide)),
        key_stride(stride_of(key_dim)),
        value_stride(stride_of(value_dim)) {}
  int64_t depth;                     // of the products q k^T, not padded
  int64_t tall_rows;                 // rows of a state, in blocks of kTallRows
  int64_t state_rows;                // rows of a state
  int64_t key_dim;                   // of a packed row of q and k, padded
  int64_t value_dim;                 // of a packed row of v and out, and of a state
  int64_t key_stride, value_stride;  // strides of rows of those
};

struct ScanScratch {
  ScanScratch(const ScanParams& p, const Sizes& n, float* begin) : space(begin) {
    const int64_t permuted_dim = p.permute ? p.score_dim : 0;
    den = space.take(kChunk);
    masked_powers = space.take(2 * kChunk);
    powers = space.take(kChunk + kFloats);
    step = space.take(permuted_dim);
    permuted = space.take(permuted_dim);
    sources = space.take(kChunk * permuted_dim);
    q = space.take(kChunk * n.key_stride);
    k = space.take(kChunk * n.key_stride);
    k_columns = space.take(n.key_dim * kChunk);
    v = space.take(kChunk * n.value_stride);
    out = space.take(kChunk * n.value_stride);
    scores = space.take(kChunk * kChunk);
  }
  Workspace space;
  float* den;
  float* masked_powers;  // [kChunk - 1 - d] = decay^d; 0 from kChunk on hides later tokens
  float* powers;         // [d] = decay^d
  // Indices of dims, in words as large as an element of q.
  void* step;        // (score_dim,): the permutation
  void* sources;     // (kChunk, score_dim): its power at each token
  void* permuted;    // (score_dim,): a row of q or k
  float *q, *k;      // (kChunk, key_stride)
  float* k_columns;  // (key_dim, kChunk)
  float *v, *out;    // (kChunk, value_stride)
  float* scores;     // (kChunk, kChunk)
};

template <typename T>
struct ChunkRows {
  T* operator[](int64_t i) const { return begin + i * stride; }
  T* begin;
  int64_t stride;
};

struct Chunk {
  Chunk(const ScanParams& p, const ScanPart& part, float* workspace, float* state)
      : p(p),
        part(part),
        n(p),
        s(p, n, workspace),
        state(state),
        key_sum(state + n.state_rows * n.value_stride),
        count(part.count),
        rows(round_up(count, kTallRows)),
        columns(round_up(count, kFloats)) {
    const double decay = p.decay ? p.decay[part.head] : 1.0;
    doubles power{1.0};
    for (int i = 1; i < kDoubles; ++i) power[i] = power[i - 1] * decay;
    const double step = power[kDoubles - 1] * decay;
    for (int64_t d = 0; d <= kChunk; d += kFloats) {
      const doubles next = power * step;
      store(s.powers + d, narrow(power, next));
      power = next * step;
    }
    for (int64_t d = 0; d < kChunk; ++d) s.masked_powers[kChunk - 1 - d] = s.powers[d];
    std::memset(s.masked_powers + kChunk, 0, kChunk * sizeof(float));
  }

  // The number of a tensor's heads that share this state, and the first of them.
  int64_t group(int64_t heads) const { return greater(heads / p.heads, 1); }
  int64_t first_head(int64_t heads) const { return part.head * heads / p.heads; }
  int64_t token(int64_t i) const {
    i += part.first;
    return part.token + (p.reverse ? part.length - 1 - i : i);
  }
  // Returns the chunk's rows of x; `head` counts the heads that share the state.
  template <typename T>
  ChunkRows<T> rows_of(const ScanTensor& x, int64_t head) const {
    return {static_cast<T*>(x.data) + part.batch * x.stride_batch + token(0) * x.stride_seq +
                (first_head(x.heads) + head) * x.stride_head,
            p.reverse ? -x.stride_seq : x.stride_seq};
  }
  float* number(const RowNumbers& x, int64_t head, int64_t i) const {
    const int64_t h = first_head(x.heads) + head;
    return x.data + (part.batch * x.heads + h) * p.seqlen + token(i);
  }

  const ScanParams& p;
  const ScanPart& part;
  Sizes n;
  ScanScratch s;
  float* state;    // (state_rows, value_stride)
  float* key_sum;  // (key_dim,)
  int64_t count;
  int64_t rows, columns;  // count, padded with zeros
};

// -------------------------------------------------------------------------------------------------
// Operands

template <typename T>
using WordOf = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

inline floats feature(floats v) { return (v < floats{} ? floats{} : v) + kFeatureEps; }

// Converts a row to floats, zero after dim.
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

// Finds the dims of q and k that each of the chunk's tokens takes.
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

// Packs rows of x as floats, `stride` apart, zero past the chunk's last row up to `padded`.
template <bool Phi, typename T>
void pack_rows(const Chunk& c, const ScanTensor& x, int64_t head, int64_t dim, int64_t stride,
               int64_t padded, float* to) {
  const ChunkRows<const T> rows = c.rows_of<const T>(x, head);
  for (int64_t i = 0; i < c.count; ++i) pack_row<Phi>(rows[i], dim, stride, to + i * stride);
  std::memset(to + c.count * stride, 0, (padded - c.count) * stride * sizeof(float));
}

// Packs rows like pack_rows with Phi, permuted by the result of find_sources.
template <typename T>
void pack_permuted(const Chunk& c, const ScanTensor& x, int64_t head, int64_t padded, float* to) {
  using Word = WordOf<T>;
  const int64_t dim = c.p.score_dim, stride = c.n.key_stride;
  const ChunkRows<const T> rows = c.rows_of<const T>(x, head);
  const Word* sources = static_cast<const Word*>(c.s.sources);
  Word* permuted = static_cast<Word*>(c.s.permuted);
  const Gather<Word> gather = choose_gather<Word>(dim);
  for (int64_t i = 0; i < c.count; ++i) {
    gather(reinterpret_cast<const Word*>(rows[i]), sources + i * dim, permuted, dim);
    pack_row<true>(reinterpret_cast<const T*>(permuted), dim, stride, to + i * stride);
  }
  std::memset(to + c.count * stride, 0, (padded - c.count) * stride * sizeof(float));
}

// Packs rows of q or k, with their extra numbers after the dims.
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
