// How a sweep sees a part of a sequence: its scratch memory, its chunks, and the packing of
// operands.
#pragma once

#include "gemm.h"
#include "permuteformer.h"
#include "workspace.h"

namespace extrope {
namespace {

constexpr float kFeatureEps = 1e-3f;  // FEATURE_EPS of sweep.py
constexpr int64_t kChunk = 96;
static_assert(kChunk % kTallRows == 0 && kChunk % kWide == 0);

struct Sizes {
  explicit Sizes(const SweepParams& p)
      : depth(p.score_dim + (p.extra ? 1 : 0)),
        rows(round_up(depth, kTallRows)),
        lanes(round_up(rows, kFloats)),
        wide(round_up(p.value_dim, kWide)) {}
  int64_t depth;  // of the products x y^T
  int64_t rows;   // of the state
  int64_t lanes;  // of a packed row of x and y
  int64_t wide;   // of a packed row of w and out, and of the state
};

struct Scratch {
  Scratch(const Sizes& n, float* begin) : space(begin) {
    x = space.take(kChunk * n.lanes);
    y = space.take(kChunk * n.lanes);
    y_columns = space.take(n.lanes * kChunk);
    w = space.take(kChunk * n.wide);
    out = space.take(kChunk * n.wide);
    scores = space.take(kChunk * kChunk);
    den = space.take(kChunk);
    falling = space.take(2 * kChunk);
    rising = space.take(kChunk + 1);
  }
  Workspace space;
  float *x, *y;      // (kChunk, lanes)
  float* y_columns;  // (lanes, kChunk)
  float *w, *out;    // (kChunk, wide)
  float* scores;     // (kChunk, kChunk)
  float* den;
  float* falling;  // [kChunk - 1 - d] = decay^d; 0 from kChunk on: later tokens are not seen
  float* rising;   // [d] = decay^d
};

// The first of the heads that share this part's state.
inline int64_t first_head(const SweepParams& p, const SweepPart& part, int64_t heads) {
  return part.head * heads / p.heads;
}

inline int64_t heads_of_state(const SweepParams& p, int64_t heads) {
  return greater(heads / p.heads, 1);
}

struct Part {
  Part(const SweepParams& p, const SweepPart& part, float* workspace, float* state)
      : p(p), part(part), n(p), s(n, workspace), state(state), sum(state + n.rows * n.wide) {
    double power = 1.0;
    const double decay = p.decay ? p.decay[part.head] : 1.0;
    for (int64_t d = 0; d <= kChunk; ++d, power *= decay) {
      s.rising[d] = static_cast<float>(power);
      if (d < kChunk) s.falling[kChunk - 1 - d] = s.rising[d];
    }
    std::memset(s.falling + kChunk, 0, kChunk * sizeof(float));
  }
  int64_t token(int64_t i) const { return part.token + (p.reverse ? part.length - 1 - i : i); }
  int64_t offset(const SweepTensor& x, int64_t head, int64_t i) const {
    return part.batch * x.batch + token(i) * x.seq + head * x.head;
  }
  float* number(const RowNumbers& n, int64_t head, int64_t i) const {
    const int64_t h = first_head(p, part, n.heads) + head;
    return n.data + (part.batch * n.heads + h) * p.seqlen + token(i);
  }
  const SweepParams& p;
  const SweepPart& part;
  Sizes n;
  Scratch s;
  float* state;  // (rows, wide)
  float* sum;    // (lanes,): of y
};

// Some tokens of a part.
struct Chunk {
  Chunk(const Part& part, int64_t first)
      : first(first),
        count(smaller(kChunk, part.part.first + part.part.count - first)),
        rows(round_up(count, kTallRows)),
        lanes(round_up(count, kWide)) {}
  int64_t first, count;
  int64_t rows, lanes;  // padded with zeros
};

// ----------------------------------------------------------------------------------------------
// Packing

inline floats feature(floats v) { return (v < floats{} ? floats{} : v) + kFeatureEps; }

// Rows of one head are too short and too far apart for the processor to see where they lead.
template <typename T>
void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + d, 0, 2);
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
template <bool Phi, typename T>
void pack_rows(const Part& part, const Chunk& chunk, const SweepTensor& x, int64_t head,
               int64_t dim, int64_t step, int64_t padded, float* to) {
  const int64_t h = first_head(part.p, part.part, x.heads) + head;
  for (int64_t i = 0; i < chunk.count; ++i) {
    const T* from = static_cast<const T*>(x.data) + part.offset(x, h, chunk.first + i);
    if (h + 1 < x.heads) prefetch_row(from + x.head, dim);  // the next to be packed
    pack_row<Phi>(from, dim, step, to + i * step);
  }
  std::memset(to + chunk.count * step, 0, (padded - chunk.count) * step * sizeof(float));
}

template <typename T>
void pack(const Part& part, const Chunk& chunk, const SweepTensor& x, int64_t head, int64_t dim,
          bool phi, int64_t step, int64_t padded, float* to) {
  phi ? pack_rows<true, T>(part, chunk, x, head, dim, step, padded, to)
      : pack_rows<false, T>(part, chunk, x, head, dim, step, padded, to);
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
  pack<T>(part, chunk, p.x, head, p.score_dim, p.phi_scores, part.n.lanes, chunk.rows, part.s.x);
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
  pack<T>(part, chunk, p.y, head, p.score_dim, p.phi_scores, part.n.lanes, chunk.lanes, part.s.y);
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
