// Converts divisors and offsets of maps of pairs from their tensor for kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/regions.h"
#include "cpu/runtime/frequencies.h"

namespace extrope {

inline void check_map(const char* op, const PositionMap& map, int64_t rows) {
  if (!map.is_of_pairs()) return;
  require_of(op, 0 <= map.row && map.row < rows, "maps name row ", map.row, " of ", rows,
             " in pair_maps");
}

inline void check_pair_maps(const char* op, const OptionalView& table, int64_t heads_k,
                            int64_t half, bool decays, const Regions& regions) {
  const int64_t rows = table.has_value() && table->dim() > 0 ? table->size(0) : 0;
  for (int64_t r = 0; r < regions.count; ++r) {
    check_map(op, regions.at[r].q_map, rows);
    check_map(op, regions.at[r].k_map, rows);
  }
  check_map(op, regions.stored, rows);
  if (!table.has_value()) return;
  const int64_t heads = table->dim() == 4 ? table->size(2) : 0;
  require_of(op,
             table->scalar_type() == ScalarType::Double && table->is_cpu() && table->dim() == 4 &&
                 table->size(1) == 2 && (heads == 1 || heads == heads_k) && table->size(3) == half,
             "maps of pairs must be of ", half, " pairs and ", heads_k,
             " heads or one, as float64 (rows, 2, heads, pairs) on the CPU, got shape ",
             shape_of(*table));
  require_of(op, !decays,
             "log_decay (XPOS) needs maps of one divisor for all pairs, got maps of pairs");
}

// Checks the table (rows, 2, heads_k or 1, half), and makes `regions` point to the returned values.
inline std::vector<double> set_pair_maps(const char* op, const OptionalView& table, int64_t heads_k,
                                         int64_t half, bool decays, Regions& regions) {
  check_pair_maps(op, table, heads_k, half, decays, regions);
  if (!table.has_value()) return {};
  const int64_t rows = table->size(0), heads = table->size(2), padded = padded_pairs(half);
  std::vector<double> values(rows * 2 * heads * padded, 1.0);  // padding: divisors must not be 0
  const double* from = static_cast<const double*>(table->data_ptr());
  for (int64_t n = 0; n < rows * 2 * heads; ++n) {
    const int64_t at = n / (2 * heads) * table->stride(0) + n / heads % 2 * table->stride(1) +
                       n % heads * table->stride(2);
    const bool divides = n / heads % 2 == 0;
    for (int64_t i = 0; i < half; ++i) {
      const double x = values[n * padded + i] = from[at + i * table->stride(3)];
      require_of(op, divides ? x > 0 : std::isfinite(x),
                 "a map must have a divisor > 0 and a finite offset, got ", x);
    }
  }
  regions.pair_maps = {values.data(), heads, padded};
  return values;
}

}  // namespace extrope
