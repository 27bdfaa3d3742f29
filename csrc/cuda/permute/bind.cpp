// The op of the CUDA kernel of the permutation, which starts it on torch's current stream.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/ops.h"
#include "common/permute_bind.h"
#include "cuda/permute/kernel.h"
#include "cuda/stream.h"

namespace extrope::permute {
namespace {

void launch(const PermuteParams& p, int device_index) {
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const int error = permute_launch(p, current_stream("permute", device_index), device_index);
  require(error == 0, "CUDA error ", error, ": ", permute_error(error));
}

const Ops ops{{"permute_fwd", TORCH_BOX(&PermuteOps<launch>::forward)}};

}  // namespace
}  // namespace extrope::permute
