// Rows of frequencies in float64, padded to whole vectors, for fill_sincos.
#pragma once

#include <cstdint>
#include <vector>

namespace extrope {

struct PaddedRows {
  int64_t rows, heads, half, padded;
  std::vector<double> values;  // (rows, heads, padded)
};

}  // namespace extrope
