// From an op's arguments to Regions, with every check.
#pragma once

#include <optional>
#include <vector>

#include "common/regions.h"
#include "common/tensor_args.h"

namespace extrope {

inline Regions regions_of(const char* op, const std::vector<int64_t>& starts, int64_t granularity,
                          const std::vector<double>& maps, std::optional<int64_t> sliding_window) {
  Regions r{static_cast<int64_t>(starts.size()), granularity, {}, {}};
  require_of(op, r.count >= 1 && r.count <= kMaxRegions, "starts must be 1 to ", kMaxRegions,
             " rising numbers, got ", r.count);
  require_of(op, granularity >= 1, "granularity must be >= 1, got ", granularity);
  require_of(op, static_cast<int64_t>(maps.size()) == (2 * r.count + 1) * kMapNumbers,
             "maps must be ", (2 * r.count + 1) * kMapNumbers, " numbers for ", r.count,
             " regions, got ", maps.size());
  for (int64_t i = 0; i < r.count; ++i) {
    require_of(op, i == 0 || starts[i] >= starts[i - 1],
               "starts must be 1 to 3 rising numbers, got ", starts[i], " after ",
               starts[i == 0 ? 0 : i - 1]);
    const double* numbers = maps.data() + 2 * i * kMapNumbers;
    r.at[i] = {starts[i], map_of(numbers), map_of(numbers + kMapNumbers)};
  }
  r.stored = map_of(maps.data() + 2 * r.count * kMapNumbers);
  r.sliding_window = sliding_window.value_or(kNoWindow);
  require_of(op, r.sliding_window >= 1, "sliding_window must be None or >= 1, got ",
             r.sliding_window);
  return r;
}

}  // namespace extrope
