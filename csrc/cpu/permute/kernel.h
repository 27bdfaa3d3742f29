// The CPU kernels of the permutation, one for each instruction set that permute_kernel.cpp is
// compiled for.
#pragma once

#include <cstdint>

#include "common/permute_params.h"

namespace extrope {

// The permutations whose powers are taken (those given, or their inverses), each array
// (rows, head_dim).
struct PermuteCycles {
  const int32_t* step;  // the permutation: dim c takes dim step[c]
  const int32_t* flat;  // its dims, cycle after cycle, each in the order of the steps
  const int32_t* end;   // where in flat the cycle that starts here ends; unset elsewhere
};

// Permutes the tokens begin..end-1 of the batch * seqlen tokens in row-major order.
using PermuteTokens = void (*)(const PermuteParams&, const PermuteCycles&, int64_t begin,
                               int64_t end);

void permute_tokens_baseline(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);
void permute_tokens_avx2(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);
void permute_tokens_avx512(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);
void permute_tokens_neon(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);

}  // namespace extrope
