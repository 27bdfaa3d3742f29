// Which cached keys a query sees, and what query and key are turned by.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/decode/kernels.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

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
