#include "cpu/runtime/kept_pages.h"

#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace extrope {
namespace {

#if defined(__aarch64__)
constexpr uintptr_t kPage = uintptr_t{1} << 16;  // the largest page size of a Linux kernel
#else
constexpr uintptr_t kPage = 4096;
#endif
constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
constexpr int64_t kMostKept = int64_t{1} << 30;

class KeptPages {
 public:
  // Takes the smallest mapping of at least `bytes` and at most a quarter more; begin is null if
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
      munmap(pages.begin, pages.bytes);
      return;
    }
    std::vector<Pages> surplus{pages};
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      surplus.clear();
      all_.push_back(pages);
      kept_ += pages.bytes;
      while (kept_ > kMostKept) surplus.push_back(oldest());
    }
    for (const Pages& each : surplus) munmap(each.begin, each.bytes);
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

// Maps memory from a huge page's boundary on; its last, partial huge page has small pages.
Pages map(int64_t bytes) {
  const uintptr_t wanted = (bytes + kPage - 1) / kPage * kPage, all = wanted + kHugePage;
  void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return {nullptr, 0};
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  if (begin > first) munmap(memory, begin - first);
  if (begin + wanted < first + all) {
    munmap(reinterpret_cast<void*>(begin + wanted), first + all - begin - wanted);
  }
  void* aligned = reinterpret_cast<void*>(begin);
  madvise(aligned, wanted, MADV_HUGEPAGE);  // a hint: its result does not matter
  return {aligned, static_cast<int64_t>(wanted)};
}

}  // namespace

Pages take_pages(int64_t bytes) {
  if (bytes < kLarge) return {nullptr, 0};
  const Pages kept = kept_pages().take(bytes);
  return kept.begin ? kept : map(bytes);
}

void keep_pages(Pages pages) { kept_pages().keep(pages); }

}  // namespace extrope
