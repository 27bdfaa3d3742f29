// Buffer, a std::vector for kernels that are compiled once for each instruction set.
//
// The functions of std::vector<float> are weak, and the linker keeps one copy of them, whichever
// instruction set it was compiled for. An allocator of this translation unit alone makes every
// function that the vector needs its own.
//
// Buffers begin at cache lines: a vector register's 64 bytes that lie across two are loaded twice.
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
