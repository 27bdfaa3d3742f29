// Lets the thread sanitizer see how the CPU kernels share their work: put before every source with
// -include, it runs torch's parallel loops on std::thread. The sanitizer knows when those start and
// end; of OpenMP's threads, whose runtime is not instrumented, it does not.
#pragma once

#if __has_include(<torch/csrc/stable/ops.h>)
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace torch::stable {

template <typename F>
void threaded_parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t kThreads = 3;
  const int64_t share = std::max<int64_t>({(end - begin + kThreads - 1) / kThreads, grain, 1});
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back([&f, first, last = std::min(first + share, end)] { f(first, last); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for threaded_parallel_for
#endif
