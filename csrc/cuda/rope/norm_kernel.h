// The CUDA kernels of the rotation with a norm before it, free of torch and of CUDA headers.
#pragma once

#include "common/rope_norm_params.h"

namespace extrope {

constexpr int64_t kMaxNormedDim = 4096;  // of a head that these take

// Enqueues the norm and the rotation on `stream` (a cudaStream_t) of the current device. Returns 0
// or a cudaError_t, as the others do.
int rope_norm_launch(const RopeNormParams& params, void* stream);

// The gradients of rows and, in parts, of the weights.
int rope_norm_backward_launch(const RopeNormParams& params, void* stream);

// How many tokens a part has, and how many parts there are: the same on every chip, so that the
// bits of a sum are, too.
constexpr int64_t kNormParts = 512;
inline int64_t norm_part_tokens(int64_t tokens) {
  return tokens > kNormParts ? (tokens + kNormParts - 1) / kNormParts : 1;
}

// Sums `count` parts of dims[n] elements, as rope_norm_backward_launch leaves them, into grads[n]:
// float, or double for tensors in double.
int rope_norm_sum_launch(const RopeNormParams& params, int64_t count, const int64_t* dims,
                         void* const* grads, void* stream);

}  // namespace extrope
