// Tensors of frequencies as padded rows.
#pragma once

#include <algorithm>

#include "common/tensor_args.h"
#include "cpu/runtime/padded_rows.h"

namespace extrope {

// inv_freq: float32 or float64, (half,) or (rows, half).
inline PaddedRows padded_rows(const Tensor& inv_freq) {
  constexpr int64_t kPad = 16;  // elements of the widest vector
  const bool several = inv_freq.dim() == 2;
  PaddedRows out{several ? inv_freq.size(0) : 1, inv_freq.size(inv_freq.dim() - 1), 0, {}};
  out.padded = (out.half + kPad - 1) / kPad * kPad;
  out.values.resize(out.rows * out.padded);
  const auto copy = [&](const auto* from) {
    const int64_t step = several ? inv_freq.stride(0) : 0;
    for (int64_t row = 0; row < out.rows; ++row) {
      std::copy_n(from + row * step, out.half, &out.values[row * out.padded]);
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
