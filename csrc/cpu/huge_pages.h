// Fresh outputs cost more than the rotation: the kernel of the operating system clears and maps
// them 4 KiB at a time. Asking for 2 MiB pages beforehand makes an out-of-place call 2 to 3 times
// faster.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace extrope {

// A hint, for memory that is about to be written whole; does nothing where it is not understood.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace extrope
