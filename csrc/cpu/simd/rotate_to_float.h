// Rotates a row while reading it into float.
#pragma once

#include <tuple>

#include "common/rope_params.h"
#include "cpu/simd/pairs.h"

namespace extrope {
namespace {

// Rotates the pairs of dims of one row by `direction` (1, or -1: back), and copies the rest.
template <typename T>
inline void rotate_to_float(const RowRotation& row, const T* in, const float* cos, const float* sin,
                            float direction, float* out) {
  const int64_t half = row.half, second = row.interleaved ? 1 : half;
  const int64_t step = row.interleaved ? 2 : 1;
  const int64_t first = row.rotary_offset;
  for (int64_t d = 0; d < first; ++d) out[d] = widen(in[d]);
  for (int64_t d = first + 2 * half; d < row.dim; ++d) out[d] = widen(in[d]);
  in += first, out += first;
  int64_t i = 0;
  for (; i + kFloats <= half; i += kFloats) {
    floats a, b;
    if (row.interleaved) {
      std::tie(a, b) = load_pairs(in + 2 * i);
    } else {
      a = load_wide(in + i), b = load_wide(in + half + i);
    }
    const floats c = load<floats>(cos + i), s = load<floats>(sin + i) * direction;
    const floats out_a = a * c - b * s, out_b = b * c + a * s;
    if (row.interleaved) {
      store_pairs(out + 2 * i, out_a, out_b);
    } else {
      store(out + i, out_a);
      store(out + half + i, out_b);
    }
  }
  for (; i < half; ++i) {
    const float a = widen(in[step * i]), b = widen(in[step * i + second]), s = sin[i] * direction;
    out[step * i] = a * cos[i] - b * s;
    out[step * i + second] = b * cos[i] + a * s;
  }
}

}  // namespace
}  // namespace extrope
