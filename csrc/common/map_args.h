// Reads position maps from an op's arguments: a column for each field, an entry for each map, as
// extrope_kernels/ops/_shared/maps.py writes them.
#pragma once

#include <vector>

#include "common/regions.h"
#include "common/tensor_args.h"

namespace extrope {

struct MapColumns {
  const std::vector<int64_t>&kinds, &moduli;
  const std::vector<double>& divisors;
  const std::vector<bool>& floors;
  const std::vector<double>&offsets, &caps;
  const std::vector<int64_t>& rows;
};

// Checks that every column has an entry for each of `count` maps.
inline void check_columns(const char* op, const MapColumns& x, size_t count) {
  const auto check = [&](const char* name, size_t size) {
    require_of(op, size == count, name, " must be of ", count, " maps, got ", size);
  };
  check("map_kinds", x.kinds.size());
  check("map_moduli", x.moduli.size());
  check("map_divisors", x.divisors.size());
  check("map_floors", x.floors.size());
  check("map_offsets", x.offsets.size());
  check("map_caps", x.caps.size());
  check("map_rows", x.rows.size());
}

// Returns the n-th map. A column has no meaning where the map's kind does not read it.
inline PositionMap map_at(const char* op, const MapColumns& x, size_t n) {
  const MapKind kind = static_cast<MapKind>(x.kinds[n]);
  switch (kind) {
    case MapKind::kSame:
      return {};
    case MapKind::kShifted:
      return {.kind = kind, .modulus = x.moduli[n], .offset = x.offsets[n]};
    case MapKind::kGrouped:
    case MapKind::kCapped:
      return {.kind = kind,
              .modulus = x.moduli[n],
              .divisor = x.divisors[n],
              .floor = x.floors[n],
              .offset = x.offsets[n],
              .cap = kind == MapKind::kCapped ? x.caps[n] : INFINITY};
    case MapKind::kConstant:
      return PositionMap::constant(x.offsets[n]);
    case MapKind::kPerPair:
      return {.kind = kind, .modulus = x.moduli[n], .floor = x.floors[n], .row = x.rows[n]};
  }
  require_of(op, false, "map_kinds must be those of MapKind, got ", x.kinds[n]);
  return {};
}

}  // namespace extrope
