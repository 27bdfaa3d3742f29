// The arguments of a rotary kernel in plain data, for CPU and CUDA kernels, free of torch.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

// One of q and k. Strides are in elements; the last dimension is contiguous.
struct RopeTensor {
  const void* in;     // (batch, seqlen, heads, head_dim)
  void* out;          // same shape; `out == in` rotates in place and skips the other dims
  const void* saved;  // the forward's input, read only for angle_grad, else nullptr
  int64_t in_batch, in_seq, in_head;
  int64_t out_batch, out_seq, out_head;
  // If out is a cache: the first element of each token's row, -1 to write nothing. Used instead of
  // out_batch and out_seq, on the CPU only.
  const int64_t* out_rows;
  int64_t saved_batch, saved_seq, saved_head;
  int64_t heads;
  double decay_sign;  // times exp(decay_sign * (position - decay_origin) * log_decay)
};

struct CopiedRows;

// The dims of a row that rotate: `half` pairs from dim rotary_offset on, of `dim`.
struct RowRotation {
  int64_t dim, half, rotary_offset;
  bool interleaved;  // pairs are rotated dims (2i, 2i + 1); else (i, i + half)
};

struct RopeParams : TokenParams {
  RopeTensor tensors[2];
  int32_t num_tensors;
  DType dtype;
  bool interleaved;  // pair i is rotated dims (2i, 2i + 1); else (i, i + rotary_dim / 2)
  bool conjugate;    // rotate by minus the angle
  int64_t head_dim, rotary_dim;
  int64_t rotary_offset;  // the first of the rotary_dim dims that rotate

  // (sequences or 1, heads or 1, rotary_dim / 2), contiguous in the last dimension; stride 0
  // broadcasts.
  const void* inv_freq;
  bool inv_freq_is_f64;
  int64_t freq_batch, freq_head;

  // (rotary_dim / 2,): the axis of each pair, out of num_axes tables of positions, position_axis
  // apart. nullptr: one table for all.
  const int32_t* axes;
  int64_t num_axes, position_axis;

  const float* log_decay;  // (rotary_dim / 2,), nullptr: only the amplitude
  double decay_origin;     // the position at which the decay is 1
  double amplitude;

  // Gradient of the angles, summed over q, k and the heads that share a frequency: contiguous
  // (batch, seqlen, angle_heads, rotary_dim / 2); float, or double if dtype is f64. nullptr: not
  // wanted. angle_heads is 1, or the number of heads if the frequencies differ by head.
  void* angle_grad;
  int64_t angle_heads;

  // num_copied other tensors whose rows of the same tokens are copied; on the CPU only.
  const CopiedRows* copied;
  int32_t num_copied;
};

// RMSNorm of q or of k before the rotation.
struct RopeNorm {
  const void* weight;  // (head_dim,), or (heads * head_dim,) with all_heads; nullptr: no norm
  DType weight_dtype;
  bool all_heads;  // one mean square for all heads of a token, not one per head
};

// In a backward the rotated tensors are gradients, and RopeTensor::saved has the forward's inputs.
struct RopeNormParams : RopeParams {
  RopeNorm norms[2];
  double norm_eps;  // added to the mean square

  // Partial gradients of the weights, each summed over norm_part_tokens tokens: (parts,
  // norm_part_stride) from norm_parts[n] on; float, or double if dtype is f64.
  void* norm_parts[2];
  int64_t norm_part_tokens, norm_part_stride;
};

}  // namespace extrope
