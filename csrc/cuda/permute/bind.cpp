// Registers the CUDA kernel of the permutation and starts it on torch's current stream.

#include <torch/csrc/stable/library.h>

#include "common/permute_bind.h"
#include "cuda/permute/kernel.h"
#include "cuda/stream.h"

namespace extrope::permute {
namespace {

void launch(const PermuteParams& p, int device_index) {
  const int error = permute_launch(p, current_stream("permute", device_index), device_index);
  require(error == 0, "CUDA error ", error, ": ", permute_error(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(extrope, CUDA, m) {
  m.impl("permute_fwd", TORCH_BOX(&PermuteOps<launch>::forward));
}

}  // namespace extrope::permute
