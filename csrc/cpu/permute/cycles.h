// The cycles of permutations, with the check that they are some.
#pragma once

#include <vector>

#include "common/permute_bind.h"
#include "cpu/permute/kernel.h"

namespace extrope::permute {

// Every dim is met once when, and only when, the row is a permutation.
class Decomposition {
 public:
  explicit Decomposition(const PermuteParams& p)
      : step_(p.rows * p.head_dim, -1), flat_(step_.size()), end_(step_.size()) {
    for (int64_t row = 0; row < p.rows; ++row) {
      read_row(p, row);
      find_cycles(row * p.head_dim, p.head_dim);
    }
  }

  PermuteCycles cycles() const { return {step_.data(), flat_.data(), end_.data()}; }

 private:
  void read_row(const PermuteParams& p, int64_t row) {
    const int64_t* from = p.permutations + row * p.permutation_row;
    int32_t* step = &step_[row * p.head_dim];
    int64_t met = 0;
    for (int64_t c = 0; c < p.head_dim; ++c) {
      const int64_t source = from[c];
      if (source < 0 || source >= p.head_dim) break;
      met += step[source] < 0;
      step[source] = static_cast<int32_t>(c);  // the inverse, which shows a dim that comes twice
    }
    require(met == p.head_dim, "permutations must hold 0 to ", p.head_dim - 1,
            " once in every row, row ", row, " does not");
    if (p.inverse) return;
    for (int64_t c = 0; c < p.head_dim; ++c) step[c] = static_cast<int32_t>(from[c]);
  }

  void find_cycles(int64_t row, int64_t dim) {
    std::vector<bool> met(dim);
    int64_t at = 0;
    for (int64_t first = 0; first < dim; ++first) {
      if (met[first]) continue;
      const int64_t begin = at;
      for (int64_t c = first; !met[c]; c = step_[row + c]) {
        met[c] = true;
        flat_[row + at++] = static_cast<int32_t>(c);
      }
      end_[row + begin] = static_cast<int32_t>(at);
    }
  }

  std::vector<int32_t> step_, flat_, end_;
};

}  // namespace extrope::permute
