// The CPU kernels of the rotation, with and without a norm before it, one per instruction set.
#pragma once

#include <cstdint>

#include "common/rope_params.h"

namespace extrope {

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline int64_t bytes_of_token(const RopeParams& p) {
  return (p.tensors[0].heads + p.tensors[1].heads) * p.head_dim * element_bytes(p.dtype);
}

// Rotates the tokens begin..end-1 out of batch * seqlen tokens in row-major order.
using RopeTokens = void (*)(const RopeParams&, int64_t begin, int64_t end);

void rope_tokens_baseline(const RopeParams&, int64_t begin, int64_t end);
void rope_tokens_avx2(const RopeParams&, int64_t begin, int64_t end);
void rope_tokens_avx512(const RopeParams&, int64_t begin, int64_t end);
void rope_tokens_neon(const RopeParams&, int64_t begin, int64_t end);

// Norms and rotates the tokens begin..end-1. If norm_part_tokens is set, runs the backward for the
// parts begin..end-1 of that many tokens.
using RopeNorms = void (*)(const RopeNormParams&, int64_t begin, int64_t end);

void rope_norm_baseline(const RopeNormParams&, int64_t begin, int64_t end);
void rope_norm_avx2(const RopeNormParams&, int64_t begin, int64_t end);
void rope_norm_avx512(const RopeNormParams&, int64_t begin, int64_t end);
void rope_norm_neon(const RopeNormParams&, int64_t begin, int64_t end);

}  // namespace extrope
