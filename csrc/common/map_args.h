// Reads position maps from an op's arguments: a column for each field, an entry for each map, as
// extrope_kernels/ops/_math/maps.py writes them.
#pragma once

#include <cmath>
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

inline bool is_whole(double x) { return std::isfinite(x) && std::floor(x) == x; }

// Tokens of a call are below 2**31: divided by it, they are not past the farthest position.
constexpr double kLeastDivisor = 0x1p-22;

// Refuses numbers whose result may be past the farthest position.
inline void check_result(const char* op, double divisor, double offset) {
  require_of(op, divisor >= kLeastDivisor && std::abs(offset) <= kFarthestPosition,
             "a map must have a divisor >= 2**-22 and an offset within 2**53, got ", divisor,
             " and ", offset);
}

// Refuses numbers of which a kernel would make no position.
inline void check_numbers(const char* op, const PositionMap& map) {
  require_of(op, map.modulus >= 0, "a map's modulus must be a whole number >= 0, got ",
             map.modulus);
  check_result(op, map.divisor, map.offset);
  const bool whole = map.floor || map.divisor == 1;
  require_of(op, !map.floor || is_whole(map.divisor),
             "a map with floor must have a whole divisor, got ", map.divisor);
  require_of(op, map.cap == INFINITY || (whole && is_whole(map.offset) && is_whole(map.cap)),
             "a map with a cap must have whole numbers only, got ", map.divisor, ", ", map.offset,
             " and ", map.cap);
  require_of(op, map.cap >= -kFarthestPosition, "a map's cap must be >= -2**53, got ", map.cap);
}

// Returns the n-th map. A kind says which columns it reads: another number in one of the others
// would be a map of another kind.
inline PositionMap map_at(const char* op, const MapColumns& x, size_t n) {
  const MapKind kind = static_cast<MapKind>(x.kinds[n]);
  require_of(op, MapKind::kSame <= kind && kind <= MapKind::kPerPair,
             "map_kinds must be those of MapKind, got ", x.kinds[n]);
  const auto entry = [&](const char* name, const auto& column, auto unread, bool reads) {
    const decltype(unread) value = column ? (*column)[n] : unread;
    require_of(op, reads || value == unread, name, " must be ", unread, " for a map of kind ",
               x.kinds[n], ", got ", value);
    return value;
  };
  const bool constant = kind == MapKind::kConstant, per_pair = kind == MapKind::kPerPair;
  const bool shifted = kind == MapKind::kShifted, capped = kind == MapKind::kCapped;
  const bool grouped = kind == MapKind::kGrouped || capped;
  PositionMap map{.kind = kind};
  map.modulus = entry("map_moduli", x.moduli, int64_t{0}, shifted || grouped || per_pair);
  map.divisor = entry("map_divisors", x.divisors, 1.0, grouped);
  map.floor = entry("map_floors", x.floors, false, grouped || per_pair);
  map.offset = entry("map_offsets", x.offsets, 0.0, shifted || grouped || constant);
  const double cap = entry("map_caps", x.caps, 0.0, capped);
  map.cap = capped ? cap : INFINITY;
  map.row = entry("map_rows", x.rows, int64_t{0}, per_pair);
  check_numbers(op, map);
  return constant ? PositionMap::constant(map.offset) : map;
}

}  // namespace extrope
