// Checks if the kernels of the CUDA library can run on this machine, free of torch and of CUDA
// headers.
#pragma once

#include <string>

namespace extrope {

// Returns why they cannot, in one line; empty if they can. Opens no context on any GPU.
std::string why_not();

}  // namespace extrope
