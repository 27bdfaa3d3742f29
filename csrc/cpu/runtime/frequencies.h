// Converts tensors of frequencies to padded rows.
#pragma once

#include <algorithm>

#include "common/tensor_args.h"
#include "cpu/runtime/padded_rows.h"

namespace extrope {

inline int64_t padded_pairs(int64_t half) {
  constexpr int64_t kPad = 16;  // elements in the widest vector
  return (half + kPad - 1) / kPad * kPad;
}

// inv_freq: float32 or float64, (half,), (rows, half) or (rows, heads, half).
inline PaddedRows padded_rows(const Tensor& inv_freq) {
  const int64_t dim = inv_freq.dim();
  const bool several = dim > 1, by_head = dim > 2;
  PaddedRows out{several ? inv_freq.size(0) : 1,
                 by_head ? inv_freq.size(1) : 1,
                 inv_freq.size(dim - 1),
                 padded_pairs(inv_freq.size(dim - 1)),
                 {}};
  out.values.resize(out.rows * out.heads * out.padded);
  const auto copy = [&](const auto* from) {
    const int64_t next_row = several ? inv_freq.stride(0) : 0;
    const int64_t next_head = by_head ? inv_freq.stride(1) : 0;
    for (int64_t row = 0; row < out.rows; ++row) {
      for (int64_t head = 0; head < out.heads; ++head) {
        std::copy_n(from + row * next_row + head * next_head, out.half,
                    &out.values[(row * out.heads + head) * out.padded]);
      }
    }
  };
  if (inv_freq.scalar_type() == ScalarType::Double) {
    copy(static_cast<const double*>(inv_freq.data_ptr()));
  } else {
    copy(static_cast<const float*>(inv_freq.data_ptr()));
  }
  return out;
}

}  // namespace extrope
