// What csrc/cpu/runtime/threads.h takes from torch, on std::thread: so that the driver shares work
// out as the bindings do, without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

constexpr int64_t kThreads = 3;

inline int64_t get_num_threads() { return kThreads; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t share = std::max<int64_t>({(end - begin + kThreads - 1) / kThreads, grain, 1});
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back([&f, first, last = std::min(first + share, end)] { f(first, last); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
