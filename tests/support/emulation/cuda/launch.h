// What csrc/cuda/launch.h is on a device, as loops over the grid: found in its place, it lets a
// host compiler build the kernels for the sanitizers.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <thread>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

#define EXTROPE_LAUNCH(kernel, grid, block, stream, ...) \
  ::extrope::emulate(kernel, grid, block, __VA_ARGS__)

// The worker threads that share a launch: more than one lets the thread sanitizer see two CUDA
// threads meet.
#ifndef EXTROPE_EMULATED_WORKERS
#define EXTROPE_EMULATED_WORKERS 1
#endif

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace extrope {

inline uint3 unflatten(int64_t index, const dim3& extent) {
  return {static_cast<unsigned>(index % extent.x),
          static_cast<unsigned>(index / extent.x % extent.y),
          static_cast<unsigned>(index / extent.x / extent.y)};
}

// Scattered, so that no stride of a kernel keeps its threads within one worker.
inline int64_t worker_of(int64_t thread) {
  return (static_cast<uint64_t>(thread) * 0x9E3779B97F4A7C15u >> 32) % EXTROPE_EMULATED_WORKERS;
}

// Runs every CUDA thread to its end, one after another within a worker: the kernel has no barriers,
// shuffles or shared memory.
template <typename... Params, typename... Args>
void emulate(void (*kernel)(Params...), dim3 grid, dim3 block, const Args&... args) {
  const int64_t threads = int64_t{1} * block.x * block.y * block.z;
  const int64_t total = threads * grid.x * grid.y * grid.z;
  const auto work = [&](int64_t worker) {
    gridDim = grid;
    blockDim = block;
    for (int64_t i = 0; i < total; ++i) {
      if (worker_of(i) != worker) continue;
      blockIdx = unflatten(i / threads, grid);
      threadIdx = unflatten(i % threads, block);
      kernel(args...);
    }
  };
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < EXTROPE_EMULATED_WORKERS; ++worker)
    others.emplace_back(work, worker);
  work(0);
  for (std::thread& other : others) other.join();
}

// Small, so that tests reach grids with one group of heads and with several.
template <auto kernel>
int64_t resident_threads(int, int) {
  return 512;
}

inline int launch_error() { return 0; }

inline const char* error_text(int) { return "emulated"; }

}  // namespace extrope
