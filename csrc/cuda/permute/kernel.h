// The CUDA kernel of the permutation, free of torch and of CUDA headers.
#pragma once

#include "common/permute_params.h"

namespace extrope {

// Enqueues the permutation on `stream` (a cudaStream_t) of device `device`, the current one.
// Returns 0 or a cudaError_t.
int permute_launch(const PermuteParams& params, void* stream, int device);

// What such an error means.
const char* permute_error(int error);

}  // namespace extrope
