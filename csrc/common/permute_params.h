// What a permutation kernel needs to know, in plain data: shared by the CPU and the CUDA kernels
// and free of torch.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

constexpr int64_t kMaxPermutedDim = 1024;  // as MAX_HEAD_DIM in ops/permute/power.py

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
  int32_t element_size;  // 2, 4 or 8 bytes: nothing is computed, so the type does not matter
  int64_t head_dim;

  // (rows, head_dim), contiguous in the last dimension. Row r serves the heads of a tensor from
  // r * heads / rows on.
  const int64_t* permutations;
  int64_t permutation_row;
  int64_t rows;
  bool inverse;  // take the power -p at position p
};

}  // namespace extrope
