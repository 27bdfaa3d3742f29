// What csrc/cuda/launch.h is on a device, for kernels with barriers, shuffles and shared memory: a
// fiber for each CUDA thread of a block, one block after another.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>

#include "cuda/fibers.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

#define EXTROPE_LAUNCH_SHARED(kernel, grid, block, shared, stream, ...) \
  ::extrope::emulate(kernel, grid, block, shared, __VA_ARGS__)

#define EXTROPE_SHARED(name) unsigned char* const name = ::extrope::shared_memory

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace extrope {

// What the threads of a warp meet at, and the values that they show one another.
struct Warp {
  explicit Warp(int64_t threads) : barrier(threads) {}
  Fibers::Barrier barrier;
  uint64_t values[32];
};

inline unsigned char* shared_memory;
inline Fibers::Barrier* block_barrier;
inline std::deque<Warp>* warps;

inline uint3 unflatten(int64_t index, const dim3& extent) {
  return {static_cast<unsigned>(index % extent.x),
          static_cast<unsigned>(index / extent.x % extent.y),
          static_cast<unsigned>(index / extent.x / extent.y)};
}

// Others have run meanwhile.
EXTROPE_UNSEEN inline void wait_at(Fibers::Barrier& barrier) {
  const uint3 mine = threadIdx;
  barrier.wait();
  threadIdx = mine;
}

EXTROPE_UNSEEN inline void place_thread(uint3 thread, uint3 block) {
  threadIdx = thread, blockIdx = block;
}

inline Warp& this_warp() { return (*warps)[Fibers::index() / 32]; }

template <typename... Params, typename... Args>
void emulate(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared,
             const Args&... args) {
  const int64_t threads = int64_t{1} * block.x * block.y * block.z;
  const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared]);
  Fibers::Barrier barrier(threads);
  std::deque<Warp> all_warps;
  for (int64_t first = 0; first < threads; first += 32) {
    all_warps.emplace_back(std::min<int64_t>(threads - first, 32));
  }
  shared_memory = memory.get();
  block_barrier = &barrier;
  warps = &all_warps;
  gridDim = grid;
  blockDim = block;
  Fibers::run(threads, [&](int64_t thread) {
    for (int64_t i = 0; i < blocks; ++i) {
      place_thread(unflatten(thread, block), unflatten(i, grid));
      kernel(args...);
      barrier.wait();
    }
  });
}

inline int launch_error() { return 0; }

}  // namespace extrope

inline void __syncthreads() { extrope::wait_at(*extrope::block_barrier); }

inline void __syncwarp() { extrope::wait_at(extrope::this_warp().barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  extrope::Warp& warp = extrope::this_warp();
  const int64_t lane = extrope::Fibers::index() % 32;
  std::memcpy(&warp.values[lane], &value, sizeof(value));
  __syncwarp();
  std::memcpy(&value, &warp.values[lane ^ mask], sizeof(value));
  __syncwarp();
  return value;
}
