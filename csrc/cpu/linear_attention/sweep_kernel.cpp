// Decayed linear attention on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as
// its name.
//
// Tokens are visited in chunks. Within a chunk, scores are made and masked as in softmax attention;
// what lies before it is in the state, the sum of y w^T decayed to the last token visited. Powers
// of the decay are those of distances within a chunk, so none overflows, however long the sequence.

#include "cpu/linear_attention/pack.h"
#include "cpu/linear_attention/products.h"

namespace extrope {
namespace {

// Fetched with each product of a block of sums; packing waits for memory as it is.
constexpr int64_t kLinesOfBlock = 24;

// ----------------------------------------------------------------------------------------------
// Products

// scores[i][j] = decay^(i - j) <x_i, y_j> for kTallRows rows from i and the columns from j.
template <int Vectors>
EXTROPE_INLINE void make_block_of_scores(const Part& part, int64_t i, int64_t j) {
  const Scratch& s = part.s;
  Sums<kTallRows, Vectors> sums;
  float* scores = s.scores + i * kChunk + j;
  part.ahead.fetch(kLinesOfBlock);
  multiply_lanes(sums, part, i, s.y_columns + j, kChunk, scores, kChunk);
  const float* powers = s.falling + (kChunk - 1 - i) + j;
#pragma GCC unroll 16
  for (int r = 0; r < kTallRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sums.at[r][v] *= load<floats>(powers - r + v * kFloats);
  }
  store_sums(sums, scores, kChunk);
}

// Up to the end of each block of rows.
void make_scores(const Part& part, const Chunk& chunk) {
  for (int64_t i = 0; i < chunk.rows; i += kTallRows) {
    const int64_t end = smaller(i + kTallRows, chunk.count);
    int64_t j = 0;
    for (; j + kFloats < end; j += kWide) make_block_of_scores<kWideVectors>(part, i, j);
    if (j < end) make_block_of_scores<1>(part, i, j);
  }
}

// What each row's scores sum to, those in the state included.
void sum_scores(const Part& part, const Chunk& chunk) {
  const Scratch& s = part.s;
  for (int64_t i = 0; i < chunk.count; ++i) {
    floats sums{};
    for (int64_t d = 0; d < part.n.lanes; d += kFloats) {
      sums += load<floats>(s.x + i * part.n.lane_step + d) * load<floats>(part.sum + d);
    }
    if (part.p.causal) {
      sums *= broadcast(s.rising[i + 1]);
      // Not 0 times the scores of later tokens: those may be NaN.
      for (int64_t j = 0; j <= i; j += kFloats) {
        const floats scores = load<floats>(s.scores + i * kChunk + j);
        sums += first_lanes(i + 1 - j) ? scores : floats{};
      }
    }
    s.den[i] = total(sums);
  }
}

// out = decay^(i + 1) x state (if `fresh`, else what is there) + scores w of the `seen` first
// tokens, for Rows rows from i and the columns from f. Not finite: says so, and leaves out as it
// was.
template <int Rows>
EXTROPE_INLINE bool make_block_of_rows(const Part& part, int64_t i, int64_t f, int64_t seen,
                                       bool fresh) {
  const Scratch& s = part.s;
  const Sizes& n = part.n;
  float* out = s.out + i * n.row_step + f;
  Sums<Rows, kWideVectors> sums;
  if (fresh) {
    part.ahead.fetch(kLinesOfBlock);
    multiply_lanes(sums, part, i, part.state + f, n.row_step, out, n.row_step);
  } else {
    load_sums(sums, out, n.row_step);
  }
  if (part.p.causal) {
    if (fresh && part.p.decay) scale_rows(sums, s.rising + i + 1);
    part.ahead.fetch(kLinesOfBlock);
    multiply_add(sums, s.scores + i * kChunk, kChunk, 1, s.w + f, n.row_step, seen);
    if (Rows > 1 && !first_row_is_finite(sums)) return false;
  }
  store_sums(sums, out, n.row_step);
  return true;
}

// Rows of a block read the whole block's tokens, the later ones with scores of zero. What is not
// finite would come through: then each row reads its own.
void make_rows(const Part& part, const Chunk& chunk, bool fresh) {
  for (int64_t i = 0; i < chunk.rows; i += kTallRows) {
    const int64_t end = smaller(i + kTallRows, chunk.count);
    for (int64_t f = 0; f < part.n.wide; f += kWide) {
      if (make_block_of_rows<kTallRows>(part, i, f, end, fresh)) continue;
      for (int64_t r = i; r < end; ++r) make_block_of_rows<1>(part, r, f, r + 1, fresh);
    }
  }
}

// y = decayed y; sum = factor * sum + those of all tokens.
void add_to_sum(const Part& part, const Chunk& chunk, floats factor) {
  const Scratch& s = part.s;
  for (int64_t d = 0; d < part.n.lanes; d += kFloats) {
    floats sum{};
    for (int64_t j = 0; j < chunk.count;) {
      const int64_t end = smaller(j + kTokens, chunk.count);
      floats few{};
      for (; j < end; ++j) {
        float* y = s.y + j * part.n.lane_step + d;
        const floats decayed = load<floats>(y) * broadcast(s.rising[chunk.count - 1 - j]);
        few += decayed;
        store(y, decayed);
      }
      sum += few;
    }
    store(part.sum + d, load<floats>(part.sum + d) * factor + sum);
  }
}

template <int Rows>
EXTROPE_INLINE void add_rows_to_state(const Part& part, const Chunk& chunk, floats factor,
                                      int64_t d) {
  const Scratch& s = part.s;
  const Sizes& n = part.n;
  for (int64_t f = 0; f < n.wide; f += kWide) {
    Sums<Rows, kWideVectors> sums{};
    part.ahead.fetch(kLinesOfBlock);
    multiply_add(sums, s.y + d, 1, n.lane_step, s.w + f, n.row_step, chunk.count);
    float* state = part.state + d * n.row_step + f;
    add_scaled(sums, factor, state, n.row_step);
    store_sums(sums, state, n.row_step);
  }
}

// state = decay^count state + decayed y^T w, whose terms are added up first; the state shrinks
// once, with its first head of y.
void add_to_state(const Part& part, const Chunk& chunk, bool shrink) {
  const floats factor = broadcast(shrink ? part.s.rising[chunk.count] : 1.0f);
  add_to_sum(part, chunk, factor);
  int64_t d = 0;
  for (; d < part.n.tall_rows; d += kTallRows) {
    add_rows_to_state<kTallRows>(part, chunk, factor, d);
  }
  for (; d < part.n.rows; d += kFewRows) add_rows_to_state<kFewRows>(part, chunk, factor, d);
}

// ----------------------------------------------------------------------------------------------
// Chunks

bool past_caches(const SweepParams& p) {
  return kFloats * sizeof(float) == kLine && p.out_is_float && leaves_past_caches(p, sizeof(float));
}

template <typename Out>
void store_row(const float* row, int64_t count, float factor, bool past_caches, Out* to) {
  int64_t d = 0;
  for (; d + kFloats <= count; d += kFloats) {
    const floats v = load<floats>(row + d) * broadcast(factor);
    past_caches ? store_past_caches(to + d, v) : store_narrow(to + d, v);
  }
  for (; d < count; ++d) narrow(row[d] * factor, to[d]);
}

template <typename T, typename Out>
void finish(const Part& part, const Chunk& chunk, int64_t head) {
  const SweepParams& p = part.p;
  const Walk<Out> out = part.walk<Out>(p.out, head, chunk.first);
  const bool past = past_caches(p);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t at = chunk.first + i;
    float* row = part.s.out + i * part.n.row_step;
    float factor = 1.0f;
    if (p.den) {
      *part.number({p.den, p.x.heads}, head, at) = part.s.den[i];
      factor /= part.s.den[i];
    } else if (p.x_scale.data) {
      factor = *part.number(p.x_scale, head, at);
    }
    if (p.gate.data) {
      const T* gate = part.walk<const T>(p.gate, head, at)[0];
      // After the factor: 0 times NaN would be NaN.
      for (int64_t d = 0; d < p.value_dim; ++d) {
        row[d] = widen(gate[d]) <= 0.0f ? 0.0f : row[d] * factor;
      }
      factor = 1.0f;
    }
    store_row(row, p.value_dim, factor, past, out[i]);
  }
}

template <typename T>
void sweep_chunk(const Part& part, const Chunk& chunk) {
  const SweepParams& p = part.p;
  if (p.permute) take_powers<T>(part, chunk);
  // One of the two is one: many rows share a key, or many keys make a row.
  const int64_t x_heads = heads_of_state(p, p.x.heads), y_heads = heads_of_state(p, p.y.heads);
  for (int64_t x = 0; x < x_heads; ++x) {
    pack_x<T>(part, chunk, x);
    for (int64_t y = 0; y < (p.causal ? y_heads : 1); ++y) {
      if (p.causal && (x == 0 || y_heads > 1)) {
        pack_yw<T>(part, chunk, y);
        pack_columns(part, chunk);
      }
      if (p.causal) make_scores(part, chunk);
      if (p.den) sum_scores(part, chunk);
      make_rows(part, chunk, y == 0);
      if (p.causal && x == x_heads - 1) add_to_state(part, chunk, y == 0);
    }
    p.out_is_float ? finish<T, float>(part, chunk, x) : finish<T, T>(part, chunk, x);
  }
  if (past_caches(p)) order_stores();
}

template <typename T>
void gather_chunk(const Part& part, const Chunk& chunk) {
  if (part.p.permute) take_powers<T>(part, chunk);
  for (int64_t y = 0; y < heads_of_state(part.p, part.p.y.heads); ++y) {
    pack_yw<T>(part, chunk, y);
    add_to_state(part, chunk, y == 0);
  }
}

template <typename T>
void dots(const SweepParams& p, int64_t begin, int64_t end, float* out) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / p.seqlen, seq = token % p.seqlen;
    for (int64_t head = 0; head < p.x.heads; ++head) {
      const T* x =
          static_cast<const T*>(p.x.data) + batch * p.x.batch + seq * p.x.seq + head * p.x.head;
      const T* y =
          static_cast<const T*>(p.y.data) + batch * p.y.batch + seq * p.y.seq + head * p.y.head;
      floats sums{};
      int64_t d = 0;
      for (; d + kFloats <= p.score_dim; d += kFloats) sums += load_wide(x + d) * load_wide(y + d);
      float sum = total(sums);
      for (; d < p.score_dim; ++d) sum += widen(x[d]) * widen(y[d]);
      out[(batch * p.x.heads + head) * p.seqlen + seq] = sum;
    }
  }
}

#define EXTROPE_BY_TYPE(dtype, function, ...) \
  switch (dtype) {                            \
    case DType::bf16:                         \
      return function<bf16>(__VA_ARGS__);     \
    case DType::f16:                          \
      return function<f16>(__VA_ARGS__);      \
    default:                                  \
      return function<float>(__VA_ARGS__);    \
  }

}  // namespace

SweepPlan EXTROPE_EXPAND(sweep_plan_, EXTROPE_ISA)(const SweepParams& p) {
  const Sizes n(p);
  return {kChunk, n.rows * n.row_step + n.lanes, Scratch(n, nullptr).space.used()};
}

void EXTROPE_EXPAND(sweep_gather_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                                const SweepNext& next, float* workspace,
                                                float* state) {
  Ahead ahead(p, next, false, false);
  const Part whole(p, part, ahead, workspace, state);
  EXTROPE_BY_TYPE(p.dtype, gather_chunk, whole, Chunk(part))
}

void EXTROPE_EXPAND(sweep_part_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                              const SweepNext& next, float* workspace,
                                              float* state) {
  Ahead ahead(p, next, true, !past_caches(p));
  const Part whole(p, part, ahead, workspace, state);
  EXTROPE_BY_TYPE(p.dtype, sweep_chunk, whole, Chunk(part))
}

void EXTROPE_EXPAND(sweep_load_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                              float* state) {
  convert_state<Sizes, true>(p, part, state);
}

void EXTROPE_EXPAND(sweep_save_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                              float* state) {
  convert_state<Sizes, false>(p, part, state);
}

void EXTROPE_EXPAND(sweep_dots_, EXTROPE_ISA)(const SweepParams& p, int64_t begin, int64_t end,
                                              float* out) {
  EXTROPE_BY_TYPE(p.dtype, dots, p, begin, end, out)
}

}  // namespace extrope
