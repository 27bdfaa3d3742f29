// Which cached keys a query sees, and what query and key are turned by.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention_decode.h"
#include "simd.h"

namespace extrope {
namespace {

// Turns the pairs of lanes of one row, and copies the rest.
template <typename T>
void turn_row(const DecodeParams& p, const T* in, const float* cos, const float* sin, float* out) {
  const int64_t half = p.half, second = p.interleaved ? 1 : half, step = p.interleaved ? 2 : 1;
  int64_t i = 0;
  for (; i + kFloats <= half; i += kFloats) {
    floats a, b;
    if (p.interleaved) {
      std::tie(a, b) = load_pairs(in + 2 * i);
    } else {
      a = load_wide(in + i), b = load_wide(in + half + i);
    }
    const floats c = load<floats>(cos + i), s = load<floats>(sin + i);
    const floats out_a = a * c - b * s, out_b = b * c + a * s;
    if (p.interleaved) {
      store_pairs(out + 2 * i, out_a, out_b);
    } else {
      store(out + i, out_a);
      store(out + half + i, out_b);
    }
  }
  for (; i < half; ++i) {
    const float a = widen(in[step * i]), b = widen(in[step * i + second]);
    out[step * i] = a * cos[i] - b * sin[i];
    out[step * i + second] = b * cos[i] + a * sin[i];
  }
  for (int64_t d = 2 * half; d < p.head_dim; ++d) out[d] = widen(in[d]);
}

// Which keys a query sees and in which frame.
struct Frames {
  explicit Frames(const DecodeParams& p)
      : window(p.window),
        plain(p.factor == 1.0),
        raw(std::isinf(p.factor)),
        grouped(p.grouped),
        factor(p.factor),
        group(p.grouped ? static_cast<int64_t>(p.factor) : 1) {}

  // The first near key of a query at i; there is none in plain attention.
  int64_t near_from(int64_t i) const {
    return plain ? i + 1 : std::max<int64_t>(i - window + 1, 0);
  }

  double far_query(int64_t i) const {
    if (plain) return static_cast<double>(i);
    if (raw) return static_cast<double>(window);
    if (grouped) return static_cast<double>(i / group + window - window / group);
    return static_cast<double>(window) + static_cast<double>(i - window) / factor;
  }

  // u(j): how far a stored key is from its own position.
  double key_turn(int64_t j) const {
    if (raw) return static_cast<double>(j);
    if (grouped) return static_cast<double>(j - j / group);
    return static_cast<double>(j) - static_cast<double>(j) / factor;
  }

  double table_step() const { return raw || grouped ? 1.0 : 1.0 - 1.0 / factor; }

  // The row of the table that turns key j in a tile from first on.
  int64_t table_row(int64_t j, int64_t first) const {
    return grouped ? (j - j / group) - (first - first / group) : j - first;
  }

  int64_t window;
  bool plain, raw, grouped;
  double factor;
  int64_t group;
};

}  // namespace
}  // namespace extrope
