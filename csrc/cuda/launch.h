// Launches kernels, with the runtime queries for that. Launchers call the runtime only through this
// file, so that tests can replace it.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>

#define EXTROPE_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace extrope {

// Returns how many threads of `kernel` the device holds at once, in blocks of `block` threads. It
// queries the runtime once per kernel and device; a failure counts as one block and shows at the
// launch.
template <auto kernel>
int64_t resident_threads(int block, int device) {
  static std::array<std::atomic<int64_t>, 64> known{};
  const bool cached = device >= 0 && device < static_cast<int>(known.size());
  if (cached && known[device] > 0) return known[device];
  int processors = 1, blocks = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block, 0);
  const int64_t threads = int64_t{1} * processors * blocks * block;
  if (cached && threads > 0) known[device] = threads;
  return threads;
}

inline int launch_error() { return cudaGetLastError(); }

inline const char* error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace extrope
