#include <thread>

#include "cpu/attention/kernels.h"

namespace extrope {

void wait_for_keys(const KeysDone* previous, int64_t key) {
  if (!previous) return;
  constexpr int kSpins = 256;  // then yield: the awaited thread may need the core
  for (int i = 0; previous->load(std::memory_order_acquire) < key; ++i) {
    if (i >= kSpins) std::this_thread::yield();
  }
}

}  // namespace extrope
