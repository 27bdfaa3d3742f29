// Memory of large results, which outlives them.
//
// Fresh pages cost more than the kernels that fill them: the operating system clears and maps
// them. Large results therefore lie in mappings of huge pages of their own, and a mapping whose
// tensor is gone serves the next result of about its size. The operating system is told that it
// may take kept pages back (MADV_FREE), which it does before memory runs short.
#pragma once

#include <vector>

#include "common/outputs.h"

namespace extrope {

using torch::headeronly::ScalarType;

// torch.empty_like(x), of large memory as above.
Tensor fresh_like(const Tensor& x);

// An empty contiguous tensor on the CPU.
Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype);

// Unmaps what is kept; returns how many bytes that was.
int64_t release_kept_pages();

}  // namespace extrope
