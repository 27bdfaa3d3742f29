// What a rotary kernel needs to know, in plain data: shared by the CPU and the CUDA kernels and
// free of torch.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

// One of q and k. Strides are in elements; the last dimension is contiguous.
struct RopeTensor {
  const void* in;  // (batch, seqlen, heads, head_dim)
  void* out;  // same shape; `out == in` rotates in place and leaves the dims past rotary_dim alone
  const void* saved;  // the forward's input, read for angle_grad only, else nullptr
  int64_t in_batch, in_seq, in_head;
  int64_t out_batch, out_seq, out_head;
  // Where out is a cache: the element that each token's row starts at, -1 for one that is written
  // nowhere. Instead of out_batch and out_seq, by the CPU alone.
  const int64_t* out_rows;
  int64_t saved_batch, saved_seq, saved_head;
  int64_t heads;
  double decay_sign;  // times exp(decay_sign * (position - decay_origin) * log_decay)
};

struct CopiedRows;

struct RopeParams : TokenParams {
  RopeTensor tensors[2];
  int32_t num_tensors;
  DType dtype;
  bool interleaved;  // pair i is dims (2i, 2i + 1); otherwise dims (i, i + rotary_dim / 2)
  bool conjugate;    // rotate by minus the angle
  int64_t head_dim, rotary_dim;

  // (sequences or 1, heads or 1, rotary_dim / 2), contiguous in the last dimension; stride 0
  // broadcasts.
  const void* inv_freq;
  bool inv_freq_is_f64;
  int64_t freq_batch, freq_head;

  // (rotary_dim / 2,): which of positions' num_axes tables, position_axis apart, each pair takes
  // its position from. nullptr: there is one for all.
  const int32_t* axes;
  int64_t num_axes, position_axis;

  // (batch or 1, seqlen, rotary_dim / 2) cosines and sines that are given, in place of inv_freq and
  // positions, contiguous in the last dimension. By the CPU alone; else nullptr.
  const void *cos, *sin;
  DType cos_sin_dtype;
  int64_t cos_batch, cos_seq, sin_batch, sin_seq;

  const float* log_decay;  // (rotary_dim / 2,), nullptr for amplitude alone
  double decay_origin;     // the position at which decay changes nothing
  double amplitude;

  // Gradient of the angles, summed over q, k and the heads that share a frequency: contiguous
  // (batch, seqlen, angle_heads, rotary_dim / 2); float, or double when dtype is f64. nullptr: not
  // wanted. angle_heads is 1, or the number of heads when the frequencies differ by head.
  void* angle_grad;
  int64_t angle_heads;

  // What is copied for the same tokens beside them, num_copied tensors: by the CPU alone.
  const CopiedRows* copied;
  int32_t num_copied;
};

// RMSNorm before the rotation, of q or of k.
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
