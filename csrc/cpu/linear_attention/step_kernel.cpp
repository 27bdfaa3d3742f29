// A few tokens of decayed linear attention from a state that the caller keeps: too few to pay for
// chunks. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// Each token reads and writes the state once: it fades, takes y w^T in, and makes the token's row
// on the way.

#include "cpu/linear_attention/powers.h"
#include "cpu/linear_attention/products.h"

namespace extrope {
namespace {

constexpr int kStepVectors = 4;  // of a row of the state at a time

// One token, and where the state lies before and after it.
struct Step {
  const SweepParams& p;
  float decay;
  const float *from, *from_sum;
  float *to, *to_sum;
  alignas(64) float x[kStepDim], y[kStepDim], w[kStepDim], out[kStepDim];
};

EXTROPE_INLINE floats load_some(const float* from, int64_t count) {
  floats v{};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

// `count` columns of out, and with Update of the state, from f on: of whole vectors, or of one that
// is not whole.
template <bool Update, int Vectors>
EXTROPE_INLINE void make_step_columns(Step& s, int64_t f, int64_t count) {
  const int64_t dim = s.p.score_dim, wide = s.p.value_dim;
  const floats decay = broadcast(s.decay);
  const bool whole = count == Vectors * kFloats;
  floats sums[Vectors]{};
  for (int64_t d = 0; d < dim;) {
    floats few[Vectors]{};
    for (const int64_t end = smaller(d + kTerms, dim); d < end; ++d) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = d * wide + f + v * kFloats;
        const float* from = (Update ? s.from : s.to) + at;
        floats state = whole ? load<floats>(from) : load_some(from, count);
        if constexpr (Update) {
          state = state * decay + broadcast(s.y[d]) * load<floats>(s.w + f + v * kFloats);
          std::memcpy(s.to + at, &state, (whole ? kFloats : count) * sizeof(float));
        }
        few[v] += broadcast(s.x[d]) * state;
      }
    }
    for (int v = 0; v < Vectors; ++v) sums[v] += few[v];
  }
  for (int v = 0; v < Vectors; ++v) store(s.out + f + v * kFloats, sums[v]);
}

template <bool Update>
void make_step_row(Step& s) {
  constexpr int64_t kMany = kStepVectors * kFloats;
  const int64_t wide = s.p.value_dim;
  int64_t f = 0;
  for (; f + kMany <= wide; f += kMany) make_step_columns<Update, kStepVectors>(s, f, kMany);
  for (; f + kFloats <= wide; f += kFloats) make_step_columns<Update, 1>(s, f, kFloats);
  if (f < wide) make_step_columns<Update, 1>(s, f, wide - f);
}

// What a row of a tensor is as floats, zero behind it.
template <bool Phi, typename T>
void read_step_row(const SweepTensor& x, int64_t batch, int64_t token, int64_t head, int64_t dim,
                   float* to) {
  const T* row = static_cast<const T*>(x.data) + batch * x.batch + token * x.seq + head * x.head;
  pack_row<Phi>(row, dim, round_up(dim, kFloats), to);
}

// The sum of y goes on, and gives x's denominator.
void step_sum(Step& s) {
  for (int64_t d = 0; d < s.p.score_dim; ++d) s.to_sum[d] = s.from_sum[d] * s.decay + s.y[d];
}

float step_denominator(const Step& s) {
  floats sums{};
  const int64_t dim = s.p.score_dim;
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats)
    sums += load<floats>(s.x + d) * load<floats>(s.to_sum + d);
  float sum = total(sums);
  for (; d < dim; ++d) sum += s.x[d] * s.to_sum[d];
  return sum;
}

template <typename T, typename Out>
void step_token(Step& s, int64_t batch, int64_t token, int64_t head) {
  const SweepParams& p = s.p;
  const int64_t key = head * p.y.heads / p.heads, group = greater(p.x.heads / p.heads, 1);
  read_step_row<true, T>(p.y, batch, token, key, p.score_dim, s.y);
  read_step_row<false, T>(p.w, batch, token, key, p.value_dim, s.w);
  step_sum(s);
  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    read_step_row<true, T>(p.x, batch, token, h, p.score_dim, s.x);
    h == head* group ? make_step_row<true>(s) : make_step_row<false>(s);
    float factor = 1.0f;
    if (p.den) {
      const float den = step_denominator(s);
      p.den[(batch * p.x.heads + h) * p.seqlen + token] = den;
      factor = 1.0f / den;
    }
    Out* out =
        static_cast<Out*>(p.out.data) + batch * p.out.batch + token * p.out.seq + h * p.out.head;
    for (int64_t d = 0; d < p.value_dim; ++d) narrow(s.out[d] * factor, out[d]);
  }
}

template <typename T>
void step_state(const SweepParams& p, int64_t at) {
  const int64_t batch = at / p.heads, head = at % p.heads;
  const int64_t size = p.score_dim * p.value_dim;
  float *state = p.last_state + at * size, *sum = p.last_sum + at * p.score_dim;
  Step s{.p = p,
         .decay = p.decay ? p.decay[head] : 1.0f,
         .from = state,
         .from_sum = sum,
         .to = state,
         .to_sum = sum};
  if (p.first_state) {
    s.from = p.first_state + at * size, s.from_sum = p.first_sum + at * p.score_dim;
  } else {
    std::memset(state, 0, size * sizeof(float));
    std::memset(sum, 0, p.score_dim * sizeof(float));
  }
  for (int64_t token = 0; token < p.seqlen; ++token) {
    p.out_is_float ? step_token<T, float>(s, batch, token, head)
                   : step_token<T, T>(s, batch, token, head);
    s.from = state, s.from_sum = sum;
  }
}

}  // namespace

void EXTROPE_EXPAND(sweep_step_, EXTROPE_ISA)(const SweepParams& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    p.dtype == DType::bf16  ? step_state<bf16>(p, at)
    : p.dtype == DType::f16 ? step_state<f16>(p, at)
                            : step_state<float>(p, at);
  }
}

}  // namespace extrope
