// How a memory-bound kernel is run over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "huge_pages.h"

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

template <typename Params>
void prepare_outputs(const Params& p, int64_t element_size) {
  for (int64_t n = 0; n < p.num_tensors; ++n) {
    const auto& t = p.tensors[n];
    const int64_t elements = p.batch * p.seqlen * t.heads * p.head_dim;
    if (t.out != t.in) prefer_huge_pages(t.out, elements * element_size);
  }
}

}  // namespace extrope
