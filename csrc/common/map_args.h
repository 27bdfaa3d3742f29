// Reads position maps from an op's arguments: a column for each field, an entry for each map, as
// extrope_kernels/ops/_shared/maps.py writes them.
#pragma once

#include <optional>
#include <vector>

#include "common/regions.h"
#include "common/tensor_args.h"

namespace extrope {

template <typename Entry>
using Column = std::optional<std::vector<Entry>>;  // nullopt: no map reads it

struct MapColumns {
  const std::vector<int64_t>& kinds;
  const Column<int64_t>& moduli;
  const Column<double>& divisors;
  const Column<bool>& floors;
  const Column<double>&offsets, &caps;
  const Column<int64_t>& rows;
};

// Checks that every column has an entry for each of `count` maps.
inline void check_columns(const char* op, const MapColumns& x, size_t count) {
  const auto check = [&](const char* name, size_t size) {
    require_of(op, size == count, name, " must be of ", count, " maps, got ", size);
  };
  const auto check_given = [&](const char* name, const auto& column) {
    if (column) check(name, column->size());
  };
  check("map_kinds", x.kinds.size());
  check_given("map_moduli", x.moduli);
  check_given("map_divisors", x.divisors);
  check_given("map_floors", x.floors);
  check_given("map_offsets", x.offsets);
  check_given("map_caps", x.caps);
  check_given("map_rows", x.rows);
}

// Returns the n-th map. An entry has no meaning where the map's kind does not read it.
inline PositionMap map_at(const char* op, const MapColumns& x, size_t n) {
  const MapKind kind = static_cast<MapKind>(x.kinds[n]);
  const int64_t modulus = x.moduli ? (*x.moduli)[n] : 0, row = x.rows ? (*x.rows)[n] : 0;
  const double divisor = x.divisors ? (*x.divisors)[n] : 1;
  const double offset = x.offsets ? (*x.offsets)[n] : 0, cap = x.caps ? (*x.caps)[n] : 0;
  const bool floor = x.floors && (*x.floors)[n];
  switch (kind) {
    case MapKind::kSame:
      return {};
    case MapKind::kShifted:
      return {.kind = kind, .modulus = modulus, .offset = offset};
    case MapKind::kGrouped:
    case MapKind::kCapped:
      return {.kind = kind,
              .modulus = modulus,
              .divisor = divisor,
              .floor = floor,
              .offset = offset,
              .cap = kind == MapKind::kCapped ? cap : INFINITY};
    case MapKind::kConstant:
      return PositionMap::constant(offset);
    case MapKind::kPerPair:
      return {.kind = kind, .modulus = modulus, .floor = floor, .row = row};
  }
  require_of(op, false, "map_kinds must be those of MapKind, got ", x.kinds[n]);
  return {};
}

}  // namespace extrope
