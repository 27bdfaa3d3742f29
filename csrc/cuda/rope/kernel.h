// The CUDA kernels of the rotation, free of torch and of CUDA headers.
#pragma once

#include "common/rope_norm_params.h"
#include "common/rope_params.h"

namespace extrope {

// Enqueues the rotation on `stream` (a cudaStream_t) of device `device`, the current one.
// Returns 0 or a cudaError_t.
int rope_launch(const RopeParams& params, void* stream, int device);

// What such an error means.
const char* rope_error(int error);

constexpr int64_t kMaxNormedDim = 4096;  // of a head that these take

// The same with a norm before the rotation.
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
