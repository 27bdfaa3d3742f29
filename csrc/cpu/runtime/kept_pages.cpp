#include "cpu/runtime/kept_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace extrope {
namespace {

constexpr int64_t kLarge = int64_t{4} << 20;  // bytes; malloc keeps smaller blocks
constexpr int64_t kCacheLine = 64, kHugePage = int64_t{1} << 21;
constexpr int64_t kMostKept = int64_t{1} << 30;

class KeptPages {
 public:
  // Takes the smallest block of at least `bytes` and at most a quarter more; begin is null if
  // none fits.
  Pages take(int64_t bytes) {
    // A fork while another thread holds the lock leaves it locked in the child forever.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {nullptr, 0};
    auto best = all_.end();
    for (auto it = all_.begin(); it != all_.end(); ++it) {
      if (it->bytes < bytes || it->bytes - bytes > bytes / 4) continue;
      if (best == all_.end() || it->bytes < best->bytes) best = it;
    }
    if (best == all_.end()) return {nullptr, 0};
    const Pages pages = *best;
    all_.erase(best);
    kept_ -= pages.bytes;
    return pages;
  }

  void keep(Pages pages) {
    if (pages.bytes > kMostKept || madvise(pages.begin, pages.bytes, MADV_FREE) != 0) {
      std::free(pages.begin);
      return;
    }
    std::vector<Pages> surplus{pages};
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      surplus.clear();
      all_.push_back(pages);
      kept_ += pages.bytes;
      while (kept_ > kMostKept) surplus.push_back(oldest());
    }
    for (const Pages& each : surplus) std::free(each.begin);
  }

 private:
  Pages oldest() {
    const Pages pages = all_.front();
    all_.erase(all_.begin());
    kept_ -= pages.bytes;
    return pages;
  }

  std::mutex mutex_;
  std::vector<Pages> all_;  // in the order of their release
  int64_t kept_ = 0;        // bytes
};

// Never destroyed: another thread may still compute while the process ends.
KeptPages& kept_pages() {
  static KeptPages& all = *new KeptPages;
  return all;
}

Pages allocate(int64_t bytes) {
  const int64_t unit = bytes < kLarge ? kCacheLine : kHugePage;
  const int64_t wanted = std::max<int64_t>((bytes + unit - 1) / unit, 1) * unit;
  void* memory = std::aligned_alloc(unit, wanted);
  if (!memory) throw std::bad_alloc();
  if (unit == kHugePage) madvise(memory, wanted, MADV_HUGEPAGE);  // a hint, which may fail
  return {memory, wanted};
}

}  // namespace

Pages take_pages(int64_t bytes) {
  const Pages kept = bytes < kLarge ? Pages{} : kept_pages().take(bytes);
  return kept.begin ? kept : allocate(bytes);
}

void keep_pages(Pages pages) {
  pages.bytes < kLarge ? std::free(pages.begin) : kept_pages().keep(pages);
}

}  // namespace extrope
