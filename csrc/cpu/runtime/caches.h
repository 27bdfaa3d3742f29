// How much the caches keep.
#pragma once

#include <cstdint>

namespace extrope {

// Bytes of a result of which, if it is larger, hardly any are in a cache when they are read. Where
// cores share 32 MiB, a rotation and a read of what it wrote took as long either way from 16 to 21
// MiB on.
constexpr int64_t kMostKept = int64_t{24} << 20;

}  // namespace extrope
