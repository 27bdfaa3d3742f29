// Tensors for results, large ones in kept pages.
#pragma once

#include <vector>

#include "common/outputs.h"

namespace extrope {

using torch::headeronly::ScalarType;

// torch.empty_like(x).
Tensor fresh_like(const Tensor& x);

// An empty contiguous tensor on the CPU.
Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace extrope
