// Buffer, a std::vector for kernels that are compiled once per instruction set.
//
// The functions of std::vector<float> are weak: the linker keeps one copy of them, of any
// instruction set. An allocator type local to this translation unit gives it its own copies.
//
// Buffers begin at cache lines: 64 bytes of a vector register across two lines take two loads.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace extrope {
namespace {

template <typename T>
struct LocalAllocator {
  static constexpr std::align_val_t kCacheLine{64};
  using value_type = T;
  LocalAllocator() = default;
  template <typename U>
  LocalAllocator(const LocalAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kCacheLine)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kCacheLine); }
  template <typename U>
  bool operator==(const LocalAllocator<U>&) const {
    return true;
  }
};

template <typename T>
using Buffer = std::vector<T, LocalAllocator<T>>;

}  // namespace
}  // namespace extrope
