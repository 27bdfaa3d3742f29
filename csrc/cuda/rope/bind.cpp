// The ops of the rotation's CUDA kernel, which launch it on torch's current stream.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "common/ops.h"
#include "common/rope_bind.h"
#include "cuda/rope/kernel.h"

namespace extrope {
namespace {

using GetStream = int32_t (*)(int32_t device_index, void** stream);

// torch before 2.13 gives the stream only through libtorch_cuda. A torch for the CPU has no such
// library, and the loader does not make it visible to ours otherwise: so it is looked up by name.
GetStream find_get_stream() {
  static const GetStream found = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, name);
    return reinterpret_cast<GetStream>(symbol);
  }();
  return found;
}

void* current_stream(int device_index) {
  const GetStream get_stream = find_get_stream();
  require_rope(get_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  require_rope(get_stream(device_index, &stream) == 0, "torch has no current stream on device ",
               device_index);
  return stream;
}

void launch(const RopeParams& p, int device_index) {
  if (p.batch * p.seqlen == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const int error = rope_launch(p, current_stream(device_index), device_index);
  require_rope(error == 0, "CUDA error ", error, ": ", rope_error(error));
}

const Ops ops{
    EXTROPE_OP("rope_fwd", RopeOps<launch>::fwd),
    EXTROPE_OP("rope_bwd", RopeOps<launch>::bwd),
    EXTROPE_OP("rope_inplace", RopeOps<launch>::inplace),
};

}  // namespace
}  // namespace extrope
