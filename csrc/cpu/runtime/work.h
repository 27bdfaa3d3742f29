// How a memory-bound kernel is run over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace extrope {

// A thread that gets less than this many bytes costs more to wake than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;

// Calls run(begin, end) for parts of `count` tokens of `bytes` bytes each.
template <typename Run>
void share_out(int64_t count, int64_t bytes, const Run& run) {
  const int64_t grain = kBytesPerThread / std::max<int64_t>(bytes, 1) + 1;
  if (count <= grain) return run(0, count);
  torch::stable::parallel_for(0, count, grain, run);
}

}  // namespace extrope
