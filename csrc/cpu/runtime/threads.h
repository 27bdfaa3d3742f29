// Two ways to run kernels over torch's threads: equal shares for work bound by memory, and one item
// after another for items that take unequal time or need a workspace.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace extrope {

// Waking a thread for fewer bytes than this costs more than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;
// One thread does work of fewer multiplications and additions than this, for the same reason.
constexpr int64_t kSmallWork = 1 << 20;

// Calls run(begin, end) for parts of `count` tokens of `bytes` bytes each.
template <typename Run>
void share_out(int64_t count, int64_t bytes, const Run& run) {
  const int64_t grain = kBytesPerThread / std::max<int64_t>(bytes, 1) + 1;
  if (count <= grain) return run(0, count);
  torch::stable::parallel_for(0, count, grain, run);
}

struct AlignedDelete {
  void operator()(float* x) const { ::operator delete[](x, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

// Returns uninitialised memory at an address that is a multiple of 64.
inline AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(new (std::align_val_t{64}) float[static_cast<size_t>(count)]);
}

// Returns the number of threads worth waking for `count` items of `operations` operations in all.
inline int64_t num_threads(int64_t count, int64_t operations) {
  if (operations < kSmallWork) return 1;
  return std::max<int64_t>(std::min<int64_t>(torch::stable::get_num_threads(), count), 1);
}

// Threads that take the next item as soon as they finish one. Each keeps a workspace of `workspace`
// floats.
class DynamicThreads {
 public:
  DynamicThreads(int64_t threads, int64_t workspace)
      : threads_(threads), workspace_(workspace), memory_(aligned_floats(threads * workspace)) {}

  int64_t threads() const { return threads_; }

  // Calls work(index, workspace) for every index below `count`, started in order.
  template <typename Work>
  void run(int64_t count, const Work& work) const {
    std::atomic<int64_t> next{0};
    const auto drain = [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
          work(i, memory_.get() + thread * workspace_);
        }
      }
    };
    if (threads_ == 1) return drain(0, 1);
    torch::stable::parallel_for(0, threads_, 1, drain);
  }

 private:
  int64_t threads_, workspace_;
  AlignedFloats memory_;
};

}  // namespace extrope
