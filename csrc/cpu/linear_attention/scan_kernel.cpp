// Decayed linear attention on the CPU. Compiled once per instruction set, with EXTROPE_ISA as its
// name.
//
// Tokens are visited in chunks. Within a chunk, scores are computed and masked as in softmax
// attention. Earlier tokens are in the state, the sum of k v^T decayed to the last token visited.
// Powers of the decay are only of distances within a chunk, so none overflows at any length.
// For token i of a chunk of `count`, j <= i in it, and the chunk's `state` and `key_sum` before it:
//
//   scores[i][j] = decay^(i - j) <q_i, k_j>
//   out_i = decay^(i + 1) q_i state + sum over j of scores[i][j] v_j
//   den_i = decay^(i + 1) <q_i, key_sum> + sum over j of scores[i][j]     out_i is divided by it
//   state = decay^count state + sum over j of decay^(count - 1 - j) k_j^T v_j;  key_sum without v_j
//
// If not causal, out_i = q_i state and den_i = <q_i, key_sum>, of a state of all tokens.
//
// Types of the headers:
//   ScanParams   the call: tensors, numbers per row, what is wanted. `den`: divide out by den and
//                write that here; without, q_scale is a factor of out's rows. `gate`: a tensor like
//                out, which is 0 where the gate is at most 0
//   ScanPart     which tokens of which sequence, and which state
//   Chunk        a part at hand: c.p, c.part, sizes c.n, scratch memory c.s, and the state;
//                `count` tokens, `rows` and `columns` the same padded with zeros
//   Sizes        depth: the dims of q and k that scores sum over, with an extra one for q_extra and
//                k_extra; key_dim, value_dim: those of packed rows, padded with zeros
//   ScanScratch  powers[d] = decay^d. masked_powers[kChunk - 1 - d] too, with zeros behind: from
//                kChunk - 1 - i on it has decay^(i - j) for j = 0, 1, ..., and 0 for j > i
//   Sums         a tile of sums in registers: at[row][vector]. kTallRows are the most rows;
//                kWideVectors vectors are kWide columns. multiply_add(sums, a, ..., b, ..., depth)
//                adds a b
//   floats       a vector of kFloats (4, 8 or 16) lanes
// Feature maps, k_scale and permutations (c.p.permute) are applied where a chunk's rows are packed,
// in chunk.h.

#include "cpu/linear_attention/chunk.h"
#include "cpu/runtime/caches.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// ----------------------------------------------------------------------------------------------
// Sums of products, and the order in which they are added up

// Numbers of dims, and of keys in a sum of keys, that are added in sequence before their sum joins
// the rest. In a longer chain, roundings do not average out if terms have one sign, or if feature
// maps are all eps.
constexpr int64_t kTerms = 32, kTokens = 16;

inline float total(floats v) {
  if constexpr (kFloats == 16) v += across<8>(v);
  if constexpr (kFloats >= 8) v += across<4>(v);
  v += across<2>(v);
  return (v + across<1>(v))[0];
}

template <int... I>
inline ints below(int32_t count, std::integer_sequence<int, I...>) {
  return ints{I...} < count;
}

// Returns a mask of the first `count` lanes of a vector, or of all.
inline ints first_lanes(int64_t count) {
  return below(static_cast<int32_t>(count), std::make_integer_sequence<int, kFloats>{});
}

template <int Rows, int Vectors>
EXTROPE_INLINE bool first_row_is_finite(const Sums<Rows, Vectors>& sums) {
  floats zero{};
#pragma GCC unroll 16
  for (int j = 0; j < Vectors; ++j) zero += sums.at[0][j] - sums.at[0][j];
  return total(zero) == 0.0f;
}

// sums += factor * the sums at `more`.
template <int Rows, int Vectors>
EXTROPE_INLINE void add_scaled(Sums<Rows, Vectors>& sums, floats factor, const float* more,
                               int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      sums.at[i][j] += factor * load<floats>(more + i * stride + j * kFloats);
    }
  }
}

template <int Rows>
EXTROPE_INLINE void scale_rows(Sums<Rows, kWideVectors>& sums, const float* factors) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWideVectors; ++j) sums.at[i][j] *= broadcast(factors[i]);
  }
}

// sums = a b for Rows rows of a, `depth` long. Sums of kTerms go through `partial`.
template <int Rows, int Vectors>
EXTROPE_INLINE void multiply_dims(Sums<Rows, Vectors>& sums, const float* a, int64_t a_stride,
                                  const float* b, int64_t b_stride, int64_t depth, float* partial,
                                  int64_t stride) {
  for (int64_t d = 0;; d += kTerms) {
    const int64_t left = depth - d;
    sums = {};
    multiply_add(sums, a + d, a_stride, 1, b + d * b_stride, b_stride,
                 left < kTerms ? left : kTerms);
    if (d > 0) add_scaled(sums, broadcast(1.0f), partial, stride);
    if (left <= kTerms) return;
    store_sums(sums, partial, stride);
  }
}

// ----------------------------------------------------------------------------------------------
// Products

// scores[i][j] = decay^(i - j) <q_i, k_j> for kTallRows rows from i and the columns from j.
template <int Vectors>
EXTROPE_INLINE void make_block_of_scores(const Chunk& c, int64_t i, int64_t j) {
  const ScanScratch& s = c.s;
  Sums<kTallRows, Vectors> sums;
  float* scores = s.scores + i * kChunk + j;
  multiply_dims(sums, s.q + i * c.n.key_stride, c.n.key_stride, s.k_columns + j, kChunk, c.n.depth,
                scores, kChunk);
  const float* powers = s.masked_powers + (kChunk - 1 - i) + j;
#pragma GCC unroll 16
  for (int r = 0; r < kTallRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sums.at[r][v] *= load<floats>(powers - r + v * kFloats);
  }
  store_sums(sums, scores, kChunk);
}

// Computes scores up to the end of each block of rows.
void make_scores(const Chunk& c) {
  for (int64_t i = 0; i < c.rows; i += kTallRows) {
    const int64_t end = smaller(i + kTallRows, c.count);
    int64_t j = 0;
    for (; j + kFloats < end; j += kWide) make_block_of_scores<kWideVectors>(c, i, j);
    if (j < end) make_block_of_scores<1>(c, i, j);
  }
}

// Computes the sum of each row's scores, including those in the state.
void sum_scores(const Chunk& c) {
  const ScanScratch& s = c.s;
  for (int64_t i = 0; i < c.count; ++i) {
    floats sums{};
    for (int64_t d = 0; d < c.n.key_dim; d += kFloats) {
      sums += load<floats>(s.q + i * c.n.key_stride + d) * load<floats>(c.key_sum + d);
    }
    if (c.p.causal) {
      sums *= broadcast(s.powers[i + 1]);
      // Does not multiply scores of later tokens by 0: they may be NaN.
      for (int64_t j = 0; j <= i; j += kFloats) {
        const floats scores = load<floats>(s.scores + i * kChunk + j);
        sums += first_lanes(i + 1 - j) ? scores : floats{};
      }
    }
    s.den[i] = total(sums);
  }
}

// out = (is_first_k ? decay^(i + 1) q state : out) + scores v of the first `seen` tokens, for Rows
// rows from i and the columns from f. If a result is not finite, reports that and does not write
// out.
template <int Rows>
EXTROPE_INLINE bool make_block_of_rows(const Chunk& c, int64_t i, int64_t f, int64_t seen,
                                       bool is_first_k) {
  const ScanScratch& s = c.s;
  const Sizes& n = c.n;
  float* out = s.out + i * n.value_stride + f;
  Sums<Rows, kWideVectors> sums;
  if (is_first_k) {
    multiply_dims(sums, s.q + i * n.key_stride, n.key_stride, c.state + f, n.value_stride, n.depth,
                  out, n.value_stride);
  } else {
    load_sums(sums, out, n.value_stride);
  }
  if (c.p.causal) {
    if (is_first_k && c.p.decay) scale_rows(sums, s.powers + i + 1);
    multiply_add(sums, s.scores + i * kChunk, kChunk, 1, s.v + f, n.value_stride, seen);
    if (Rows > 1 && !first_row_is_finite(sums)) return false;
  }
  store_sums(sums, out, n.value_stride);
  return true;
}

// Rows of a block read all of the block's tokens, later ones with scores of zero. Values that are
// not finite would leak into earlier rows: then each row reads only its own tokens. So does a
// single row, as in a step.
void make_rows(const Chunk& c, bool is_first_k) {
  for (int64_t i = 0; i < c.rows; i += kTallRows) {
    const int64_t end = smaller(i + kTallRows, c.count);
    for (int64_t f = 0; f < c.n.value_dim; f += kWide) {
      if (c.count > 1 && make_block_of_rows<kTallRows>(c, i, f, end, is_first_k)) continue;
      for (int64_t r = i; r < end; ++r) make_block_of_rows<1>(c, r, f, r + 1, is_first_k);
    }
  }
}

// k = decayed k; key_sum = factor * key_sum + the sum of decayed k over all tokens.
void add_to_key_sum(const Chunk& c, floats factor) {
  const ScanScratch& s = c.s;
  for (int64_t d = 0; d < c.n.key_dim; d += kFloats) {
    floats sum{};
    for (int64_t j = 0; j < c.count;) {
      const int64_t end = smaller(j + kTokens, c.count);
      floats few{};
      for (; j < end; ++j) {
        float* k = s.k + j * c.n.key_stride + d;
        const floats decayed = load<floats>(k) * broadcast(s.powers[c.count - 1 - j]);
        few += decayed;
        store(k, decayed);
      }
      sum += few;
    }
    store(c.key_sum + d, load<floats>(c.key_sum + d) * factor + sum);
  }
}

template <int Rows>
EXTROPE_INLINE void add_to_state_rows(const Chunk& c, floats factor, int64_t d) {
  const Sizes& n = c.n;
  for (int64_t f = 0; f < n.value_dim; f += kWide) {
    Sums<Rows, kWideVectors> sums{};
    multiply_add(sums, c.s.k + d, 1, n.key_stride, c.s.v + f, n.value_stride, c.count);
    float* state = c.state + d * n.value_stride + f;
    add_scaled(sums, factor, state, n.value_stride);
    store_sums(sums, state, n.value_stride);
  }
}

// state = decay^count state + decayed k^T v; the terms of the product are added up first. The state
// decays once, with its first head of k.
void add_to_state(const Chunk& c, bool is_first_k) {
  const floats factor = broadcast(is_first_k ? c.s.powers[c.count] : 1.0f);
  add_to_key_sum(c, factor);
  int64_t d = 0;
  for (; d < c.n.tall_rows; d += kTallRows) add_to_state_rows<kTallRows>(c, factor, d);
  for (; d < c.n.state_rows; d += kFewRows) add_to_state_rows<kFewRows>(c, factor, d);
}

// ----------------------------------------------------------------------------------------------
// Chunks

// Returns true to write out by streaming stores: its rows are too many for the caches, and whole
// lines of 64 bytes, which need no read before a write.
bool streams_output(const ScanParams& p) {
  const int64_t row = p.value_dim * sizeof(float);
  return kFloats == 16 && p.out_is_float && row % 64 == 0 &&
         p.batch * p.seqlen * greater(p.q.heads, p.heads) * row > kMostCached;
}

template <typename Out>
void store_row(const float* row, int64_t count, float factor, bool streaming, Out* to) {
  int64_t d = 0;
  for (; d + kFloats <= count; d += kFloats) {
    const floats v = load<floats>(row + d) * broadcast(factor);
    streaming ? store_streaming(to + d, v) : store_narrow(to + d, v);
  }
  for (; d < count; ++d) narrow(row[d] * factor, to[d]);
}

template <typename T, typename Out>
void finish(const Chunk& c, int64_t head) {
  const ScanParams& p = c.p;
  const ChunkRows<Out> out = c.rows_of<Out>(p.out, head);
  const bool streaming = streams_output(p);
  for (int64_t i = 0; i < c.count; ++i) {
    float* row = c.s.out + i * c.n.value_stride;
    float factor = 1.0f;
    if (p.den) {
      *c.number({p.den, p.q.heads}, head, i) = c.s.den[i];
      factor /= c.s.den[i];
    } else if (p.q_scale.data) {
      factor = *c.number(p.q_scale, head, i);
    }
    if (p.gate.data) {
      const T* gate = c.rows_of<const T>(p.gate, head)[i];
      // Multiply by the factor first: 0 times NaN would be NaN.
      for (int64_t d = 0; d < p.value_dim; ++d) {
        row[d] = widen(gate[d]) <= 0.0f ? 0.0f : row[d] * factor;
      }
      factor = 1.0f;
    }
    store_row(row, p.value_dim, factor, streaming, out[i]);
  }
}

template <typename T>
void scan(const Chunk& c) {
  const ScanParams& p = c.p;
  // One of the two is 1: many rows share a key, or many keys sum into a row.
  const int64_t q_heads = c.group(p.q.heads), k_heads = c.group(p.k.heads);
  for (int64_t q = 0; q < q_heads; ++q) {
    pack_q<T>(c, q);
    for (int64_t k = 0; k < (p.causal ? k_heads : 1); ++k) {
      if (p.causal && (q == 0 || k_heads > 1)) {
        pack_kv<T>(c, k);
        pack_columns(c);
      }
      if (p.causal) make_scores(c);
      if (p.den) sum_scores(c);
      make_rows(c, k == 0);
      if (p.causal && q == q_heads - 1) add_to_state(c, k == 0);
    }
    p.out_is_float ? finish<T, float>(c, q) : finish<T, T>(c, q);
  }
  if (streams_output(p)) fence_streaming_stores();
}

template <typename T>
void run_chunk(const Chunk& c, bool writes_out) {
  if (c.p.permute) find_sources<T>(c);
  if (writes_out) return scan<T>(c);
  for (int64_t k = 0; k < c.group(c.p.k.heads); ++k) {
    pack_kv<T>(c, k);
    add_to_state(c, k == 0);
  }
}

// out[batch][head][token] = <q, k> of the same row; no part of a scan.
template <typename T>
void dots(const ScanParams& p, int64_t begin, int64_t end, float* out) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / p.seqlen, seq = token % p.seqlen;
    const auto row = [&](const ScanTensor& x, int64_t head) {
      return static_cast<const T*>(x.data) + batch * x.stride_batch + seq * x.stride_seq +
             head * x.stride_head;
    };
    for (int64_t head = 0; head < p.q.heads; ++head) {
      const T *q = row(p.q, head), *k = row(p.k, head);
      floats sums{};
      int64_t d = 0;
      for (; d + kFloats <= p.score_dim; d += kFloats) sums += load_wide(q + d) * load_wide(k + d);
      float sum = total(sums);
      for (; d < p.score_dim; ++d) sum += widen(q[d]) * widen(k[d]);
      out[(batch * p.q.heads + head) * p.seqlen + seq] = sum;
    }
  }
}

}  // namespace

ScanPlan EXTROPE_EXPAND(scan_plan_, EXTROPE_ISA)(const ScanParams& p) {
  const Sizes n(p);
  return {kChunk, n.state_rows * n.value_stride + n.key_dim,
          ScanScratch(p, n, nullptr).space.used()};
}

void EXTROPE_EXPAND(scan_chunk_, EXTROPE_ISA)(const ScanParams& p, const ScanPart& part,
                                              bool writes_out, float* workspace, float* state) {
  const Chunk chunk(p, part, workspace, state);
  const auto run = p.dtype == DType::bf16  ? run_chunk<bf16>
                   : p.dtype == DType::f16 ? run_chunk<f16>
                                           : run_chunk<float>;
  run(chunk, writes_out);
}

void EXTROPE_EXPAND(scan_convert_, EXTROPE_ISA)(const ScanParams& p, const ScanPart& part,
                                                bool load, float* state) {
  const Sizes n(p);
  const auto copy = [&](float* own, const float* first, float* last, int64_t at, int64_t count) {
    load ? std::memcpy(own, first + at, count * sizeof(float))
         : std::memcpy(last + at, own, count * sizeof(float));
  };
  const int64_t row = (part.sequence * p.heads + part.head) * p.score_dim;
  for (int64_t d = 0; d < p.score_dim; ++d) {
    copy(state + d * n.value_stride, p.first_state, p.last_state, (row + d) * p.value_dim,
         p.value_dim);
  }
  copy(state + n.state_rows * n.value_stride, p.first_sum, p.last_sum, row, p.score_dim);
}

void EXTROPE_EXPAND(scan_dots_, EXTROPE_ISA)(const ScanParams& p, int64_t begin, int64_t end,
                                             float* out) {
  const auto run = p.dtype == DType::bf16  ? dots<bf16>
                   : p.dtype == DType::f16 ? dots<f16>
                                           : dots<float>;
  run(p, begin, end, out);
}

}  // namespace extrope
