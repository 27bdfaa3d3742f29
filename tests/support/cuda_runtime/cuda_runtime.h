// A CUDA runtime and driver that run nothing: they answer as the machine that the environment
// describes, and print which devices a context was opened on.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__

using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInsufficientDriver = 35, cudaErrorNoKernelImageForDevice = 209 };
enum { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
struct cudaFuncAttributes {};

inline int number(const char* name) { return std::atoi(std::getenv(name)); }

// Of DEVICES, such as "75i 90i 90": capabilities; i where the process has a context.
inline const char* device_text(int device) {
  const char* text = std::getenv("DEVICES");
  for (; device > 0 && text != nullptr; --device) {
    text = std::strchr(text, ' ');
    if (text != nullptr) ++text;
  }
  return text == nullptr || *text == 0 ? nullptr : text;
}

inline thread_local int current_device = 0;

inline void open_context(int device) { std::printf("context on %d\n", device); }

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = number("DRIVER");
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = number("RUNTIME");
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  if (number("DRIVER") < number("RUNTIME") / 1000 * 1000) return cudaErrorInsufficientDriver;
  for (*count = 0; device_text(*count) != nullptr;) ++*count;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = std::atoi(device_text(device));
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  current_device = device;
  open_context(device);  // since CUDA 12
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  open_context(current_device);
  return number("IMAGE") ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice
             ? "no kernel image is available for execution on the device"
             : "another error";
}

extern "C" inline int cuDevicePrimaryCtxGetState(int device, unsigned*, int* active) {
  const char* text = device_text(device);
  while (*text >= '0' && *text <= '9') ++text;
  *active = *text == 'i';
  return 0;
}
