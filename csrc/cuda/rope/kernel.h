// The CUDA kernel of the rotation, free of torch and of CUDA headers.
#pragma once

#include "common/rope_params.h"

namespace extrope {

// Enqueues the rotation on `stream` (a cudaStream_t) of device `device`, the current one.
// Returns 0 or a cudaError_t.
int rope_launch(const RopeParams& params, void* stream, int device);

// Returns the meaning of such an error.
const char* rope_error(int error);

}  // namespace extrope
