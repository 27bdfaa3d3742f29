// Regions of keys and position maps, the plain data that describe a score method to a kernel. See
// extrope_kernels/scores/base.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

// Kernels are compiled once per instruction set: each needs its own copy of functions it calls.
#define EXTROPE_INLINE [[gnu::always_inline]] inline

namespace extrope {

constexpr int kMaxRegions = 3;
constexpr int64_t kNoWindow = int64_t{1} << 62;

// What a map makes of a position p, f being floor or the identity; MapKind in scores/base.py.
enum class MapKind : int64_t {
  kSame = 0,      // p
  kShifted = 1,   // (p mod modulus) + offset
  kGrouped = 2,   // f((p mod modulus) / divisor) + offset
  kCapped = 3,    // min(f((p mod modulus) / divisor) + offset, cap)
  kConstant = 4,  // offset
  kPerPair = 5,   // f((p mod modulus) / divisor_i) + offset_i for pair i, from a row of PairMaps
};

// A map in the form that gives every kind but kPerPair by one formula,
// min(f((p mod modulus) / divisor) + offset, cap).
struct PositionMap {
  MapKind kind = MapKind::kSame;
  int64_t modulus = 0;  // 0: none
  double divisor = 1;   // infinite if constant
  bool floor = false;
  double offset = 0;
  double cap = INFINITY;
  int64_t row = 0;  // of PairMaps, if kPerPair

  EXTROPE_INLINE double operator()(int64_t position) const {
    return std::min(place(remainder(position), divisor, offset), cap);
  }
  EXTROPE_INLINE double remainder(int64_t position) const {
    if (modulus > 0) position -= floor_div(position, modulus) * modulus;
    return static_cast<double>(position);
  }
  EXTROPE_INLINE double place(double p, double divisor, double offset) const {
    p /= divisor;
    return (floor ? std::floor(p) : p) + offset;
  }
  EXTROPE_INLINE bool is_constant() const { return kind == MapKind::kConstant; }
  EXTROPE_INLINE bool is_of_pairs() const { return kind == MapKind::kPerPair; }
  EXTROPE_INLINE bool operator==(const PositionMap& x) const {
    return kind == x.kind && modulus == x.modulus && divisor == x.divisor && floor == x.floor &&
           offset == x.offset && cap == x.cap && row == x.row;
  }

  EXTROPE_INLINE constexpr static PositionMap constant(double place) {
    return {.kind = MapKind::kConstant, .divisor = INFINITY, .offset = place};
  }
  EXTROPE_INLINE static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
};

// Divisors and offsets of each pair of dims, a row per map of pairs.
struct PairMaps {
  const double* data = nullptr;  // (rows, 2, padded)
  int64_t padded = 0;            // pairs, rounded up to whole vectors

  EXTROPE_INLINE const double* divisors(const PositionMap& map) const {
    return data + map.row * 2 * padded;
  }
  EXTROPE_INLINE const double* offsets(const PositionMap& map) const {
    return divisors(map) + padded;
  }
};

struct Region {
  int64_t start;  // first key, counted from the query's block
  PositionMap q_map, k_map;
};

struct Regions {
  int64_t count, granularity;
  Region at[kMaxRegions];
  PositionMap q_stored, stored;        // the rotations that queries and keys already have
  int64_t sliding_window = kNoWindow;  // most keys that a query sees, its own included
  PairMaps pair_maps = {};

  // Returns the first key of region r for the query at `position`; for r == count the first key
  // after the diagonal.
  EXTROPE_INLINE int64_t start(int64_t r, int64_t position) const {
    if (position < 0) return 0;
    if (r >= count) return position + 1;
    // The division would take longer than all the rest.
    const int64_t block = granularity == 1 ? position : position / granularity * granularity;
    const int64_t oldest = std::max<int64_t>(position + 1 - sliding_window, 0);
    return std::min(std::max(block + at[r].start, oldest), position + 1);
  }

  // Drops leading regions without a key for queries before position `end`.
  void trim(int64_t end) {
    const int64_t block = std::max<int64_t>(end - 1, 0) / granularity * granularity;
    while (count > 1 && (block + at[1].start <= 0 || at[1].start <= 1 - sliding_window)) {
      std::copy(at + 1, at + count, at);
      --count;
    }
  }
};

}  // namespace extrope

#undef EXTROPE_INLINE
