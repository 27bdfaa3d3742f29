// Finds out from the runtime if our kernels can run here, before any of them is registered.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <string>
#include <thread>

#include "cuda/runtime/why_not.h"

namespace extrope {
namespace {

// Compiled for the same chips as all kernels of the library: it represents them.
__global__ void nothing() {}

constexpr int ARCHS[] = {__CUDA_ARCH_LIST__};  // 800, 900

std::string capability(int arch) {
  return std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10);
}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Returns true if the process has a context on the device. The runtime does not tell, and a query
// about a kernel would open one: some hundred MB, which rank 3 must not take from GPU 0.
bool in_use(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = dlsym(driver != nullptr ? driver : RTLD_DEFAULT, "cuDevicePrimaryCtxGetState");
  const auto get_state = reinterpret_cast<GetState>(symbol);
  unsigned flags = 0;
  int active = 0;
  return get_state != nullptr && get_state(device, &flags, &active) == 0 && active != 0;
}

std::string ask_device(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const int arch = 100 * major + 10 * minor;
  const int oldest = *std::min_element(std::begin(ARCHS), std::end(ARCHS));
  const std::string gpu = "GPU " + std::to_string(device) + " (" + capability(arch) + "): ";
  // Machine code for the oldest chip comes with PTX that the driver compiles for later ones.
  if (arch < oldest) return gpu + "the kernels are built for " + capability(oldest) + " and later";
  if (!in_use(device)) return "";
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  return error == cudaSuccess ? "" : gpu + cudaGetErrorString(error);
}

std::string ask() {
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000) {
    return "the driver is for CUDA " + version(driver) + ", the library needs CUDA " +
           version(runtime / 1000 * 1000);
  }
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int device = 0; device < devices; ++device) {
    if (const std::string why = ask_device(device); !why.empty()) return why;
  }
  return "";
}

}  // namespace

std::string why_not() {
  // The current device and the last error belong to a thread: restoring the caller's device could
  // open a context there.
  std::string why;
  std::thread([&] { why = ask(); }).join();
  return why;
}

}  // namespace extrope
