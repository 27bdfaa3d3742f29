// The CPU kernels of the permutation, one per instruction set of permute_kernel.cpp, and their
// arguments in plain data.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

constexpr int64_t kMaxPermutedDim = 1024;  // MAX_PERMUTED_DIM in ops/permuteformer/checks.py

// One of q and k. Strides are in elements; the last dimension is contiguous.
struct PermuteTensor {
  const void* in;  // (batch, seqlen, heads, head_dim)
  void* out;       // same shape, no overlap with in
  int64_t in_batch, in_seq, in_head;
  int64_t out_batch, out_seq, out_head;
  int64_t heads;  // a multiple of rows
};

struct PermuteParams : TokenParams {
  PermuteTensor tensors[2];
  int32_t num_tensors;
  int32_t element_size;  // 2, 4 or 8 bytes: without arithmetic the type does not matter
  int64_t head_dim;

  // (rows, head_dim), contiguous in the last dimension. Row r is for a tensor's heads from
  // r * heads / rows on.
  const int64_t* permutations;
  int64_t permutation_row;
  int64_t rows;
  bool inverse;  // take the power -p at position p
};

// The permutations whose powers are taken (the given ones, or their inverses); each array is
// (rows, head_dim).
struct PermuteCycles {
  const int32_t* step;  // the permutation: dim c takes dim step[c]
  const int32_t* flat;  // its dims, cycle after cycle, in the order of steps
  const int32_t* end;   // end in flat of the cycle that starts here; else unset
};

// Permutes the tokens begin..end-1 out of batch * seqlen tokens in row-major order.
using PermuteTokens = void (*)(const PermuteParams&, const PermuteCycles&, int64_t begin,
                               int64_t end);

void permute_tokens_baseline(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);
void permute_tokens_avx2(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);
void permute_tokens_avx512(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);
void permute_tokens_neon(const PermuteParams&, const PermuteCycles&, int64_t, int64_t);

}  // namespace extrope
