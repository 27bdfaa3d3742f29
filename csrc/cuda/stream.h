// torch's current stream, through the stable ABI.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "common/tensor_args.h"

namespace extrope {

using GetStream = int32_t (*)(int32_t device_index, void** stream);

// torch before 2.13 gives the stream only through libtorch_cuda. A torch for the CPU has no such
// library, and the loader does not show it to ours where it does exist, so it is asked for by name.
inline GetStream find_get_stream() {
  static const GetStream found = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, name);
    return reinterpret_cast<GetStream>(symbol);
  }();
  return found;
}

inline void* current_stream(const char* op, int device_index) {
  const GetStream get_stream = find_get_stream();
  require_of(op, get_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  require_of(op, get_stream(device_index, &stream) == 0, "torch has no current stream on device ",
             device_index);
  return stream;
}

// While it lives the device is the current one; the stream is torch's there.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;

  OnDevice(const char* op, int device_index)
      : guard(device_index), stream(current_stream(op, device_index)) {}
};

}  // namespace extrope
