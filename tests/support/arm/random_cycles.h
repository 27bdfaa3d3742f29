// Random permutations, known by their cycles.
#pragma once

#include <algorithm>

#include "cpu/permute/kernel.h"
#include "driver.h"

namespace extrope {
namespace {

class RandomCycles {
 public:
  RandomCycles(int64_t rows, int64_t dim) : step_(rows * dim), flat_(rows * dim), end_(rows * dim) {
    Random random(rows * 1000 + dim);
    for (int64_t row = 0; row < rows; ++row) {
      int32_t *flat = &flat_[row * dim], *step = &step_[row * dim];
      for (int64_t c = 0; c < dim; ++c) flat[c] = static_cast<int32_t>(c);
      for (int64_t c = dim - 1; c > 0; --c) std::swap(flat[c], flat[random.below(c + 1)]);
      for (int64_t begin = 0, end; begin < dim; begin = end) {
        end = std::min(begin + 1 + random.below(9), dim);
        for (int64_t c = begin; c < end; ++c) step[flat[c]] = flat[c + 1 < end ? c + 1 : begin];
        end_[row * dim + begin] = static_cast<int32_t>(end);
      }
    }
  }

  PermuteCycles view() const { return {step_.data(), flat_.data(), end_.data()}; }

 private:
  std::vector<int32_t> step_, flat_, end_;
};

}  // namespace
}  // namespace extrope
