// A rotation of rows that are brought to a root mean square of 1 and weighted first: RMSNorm. Plain
// data, free of torch.
#pragma once

#include "common/rope_params.h"

namespace extrope {

// The norm of q, or that of k.
struct RopeNorm {
  const void* weight;  // (head_dim,), or (heads * head_dim,) with all_heads; nullptr: not normed
  DType weight_dtype;
  bool all_heads;  // the mean square is that of all heads of a token, not of each
};

// In a backward, the rotated tensors are gradients and RopeTensor::saved the forward's inputs.
struct RopeNormParams : RopeParams {
  RopeNorm norms[2];
  double norm_eps;  // added to the mean square

  // Gradients of the weights in parts, summed over norm_part_tokens tokens each: (parts,
  // norm_part_stride) from norm_parts[n] on; float, or double when dtype is f64.
  void* norm_parts[2];
  int64_t norm_part_tokens, norm_part_stride;
};

}  // namespace extrope
