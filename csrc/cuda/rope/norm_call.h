// A launch of the rotation with a norm before it: its operands, and where their rows are.
#pragma once

#include "cuda/rope/norm_forward.h"

namespace extrope {

struct NormCall {
  static constexpr bool QUANTIZES = false;

  RopeParams rope;
  double norm_eps;
  NormOperand of[2];

  __device__ Token<double> token(int index) const { return find_token<double>(rope, index); }

  template <typename T>
  __device__ RowTarget target(int operand, const Token<double>& token, int) const {
    const RopeTensor& x = of[operand].x;
    T* out = static_cast<T*>(x.out) + token.batch * x.out_batch + token.seq * x.out_seq;
    return {out, x.out_head, nullptr};
  }
};

// The call, in accesses of `vec` elements of `bytes`; `wide` bytes an accumulator.
inline NormCall norm_call(const RopeNormParams& p, int vec, int64_t wide) {
  NormCall call{};
  call.rope = p, call.norm_eps = p.norm_eps;
  for (int n = 0; n < p.num_tensors; ++n) {
    call.of[n] = norm_operand(p.tensors[n], p.norms[n], p.head_dim, p.rotary_dim, vec, wide,
                              p.freq_head != 0);
  }
  return call;
}

inline bool norm_fits(const RopeNormParams& p, const NormCall& call, int vec, int bytes) {
  for (int n = 0; n < p.num_tensors; ++n) {
    const NormOperand& of = call.of[n];
    if (!fits(of, p.batch, p.seqlen, vec, bytes) ||
        !output_fits(of.x, p.batch, p.seqlen, vec, bytes)) {
      return false;
    }
  }
  return true;
}

// Calls run.template operator()<T, VEC>(call) with vectors of 16 bytes where they fit, else with
// elements, which serve what is rare, double too.
template <typename T, typename Run>
int choose_vectors(const RopeNormParams& p, const Run& run) {
  constexpr int VEC = std::is_same_v<T, double> ? 1 : 16 / sizeof(T);
  constexpr int64_t WIDE = sizeof(Accumulator<T>);
  if constexpr (VEC > 1) {
    const NormCall call = norm_call(p, VEC, WIDE);
    if (norm_fits(p, call, VEC, sizeof(T))) return run.template operator()<T, VEC>(call);
  }
  return run.template operator()<T, 1>(norm_call(p, 1, WIDE));
}

template <typename Run>
int choose_type(const RopeNormParams& p, const Run& run) {
  switch (p.dtype) {
    case DType::f32:
      return choose_vectors<float>(p, run);
    case DType::f64:
      return choose_vectors<double>(p, run);
    case DType::bf16:
      return choose_vectors<__nv_bfloat16>(p, run);
    default:
      return choose_vectors<__half>(p, run);
  }
}

}  // namespace extrope
