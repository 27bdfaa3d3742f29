// Scratch memory of a kernel, and conversion of rows of any type to floats.
#pragma once

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Allocates pieces of scratch memory, each aligned to 64 bytes; from nullptr it only counts.
class Workspace {
 public:
  explicit Workspace(float* begin) : begin_(begin) {}
  float* take(int64_t floats) {
    float* piece = begin_ + used_;
    used_ += round_up(floats, 16);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* begin_;
  int64_t used_ = 0;
};

template <typename T>
inline void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) store(to + i, load_wide(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}

template <typename T>
inline void narrow_row(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) store_narrow(to + i, load<floats>(from + i));
  for (; i < count; ++i) narrow(from[i], to[i]);
}

}  // namespace
}  // namespace extrope
