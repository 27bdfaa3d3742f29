// Converts divisors and offsets of maps of pairs from their tensor for kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/map_args.h"
#include "common/regions.h"
#include "cpu/runtime/frequencies.h"

namespace extrope {

inline void check_map(const char* op, const PositionMap& map, int64_t rows) {
  if (!map.is_of_pairs()) return;
  require_of(op, 0 <= map.row && map.row < rows, "maps name row ", map.row, " of ", rows,
             " in pair_maps");
}

inline void check_pair_maps(const char* op, const OptionalView& table, int64_t half, bool decays,
                            const Regions& regions) {
  const int64_t rows = table.has_value() && table->dim() > 0 ? table->size(0) : 0;
  for (int64_t r = 0; r < regions.count; ++r) {
    check_map(op, regions.at[r].q_map, rows);
    check_map(op, regions.at[r].k_map, rows);
  }
  require_of(op, !regions.stored.is_of_pairs(),
             "keys must be stored by a map that all pairs share, got one of pairs");
  if (!table.has_value()) return;
  require_of(op,
             table->scalar_type() == ScalarType::Double && table->is_cpu() && table->dim() == 3 &&
                 table->size(1) == 2 && table->size(2) == half,
             "maps of pairs must be of ", half,
             " pairs, as float64 (rows, 2, pairs) on the CPU, got shape ", shape_of(*table));
  require_of(op, !decays,
             "log_decay (XPOS) needs maps of one divisor for all pairs, got maps of pairs");
}

// Checks the table (rows, 2, half), and makes `regions` point to the returned values.
inline std::vector<double> set_pair_maps(const char* op, const OptionalView& table, int64_t half,
                                         bool decays, Regions& regions) {
  check_pair_maps(op, table, half, decays, regions);
  if (!table.has_value()) return {};
  const int64_t rows = table->size(0), padded = padded_pairs(half);
  std::vector<double> values(rows * 2 * padded, 1.0);  // padding: divisors must not be 0
  const double* from = static_cast<const double*>(table->data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    double *divisors = &values[row * 2 * padded], *offsets = divisors + padded;
    for (int64_t i = 0; i < half; ++i) {
      const double* at = from + row * table->stride(0) + i * table->stride(2);
      divisors[i] = at[0], offsets[i] = at[table->stride(1)];
      check_result(op, divisors[i], offsets[i]);
    }
  }
  regions.pair_maps = {values.data(), padded};
  return values;
}

}  // namespace extrope
