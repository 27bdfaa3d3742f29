// How much the caches keep.
#pragma once

#include <cstdint>

namespace extrope {

// Bytes: of a larger result hardly any is in a cache when it is read. Where cores share 32 MiB, a
// rotation and a read of what it wrote took as long past the caches as through them between 16 and
// 21 MiB, more below and less above.
constexpr int64_t kMostKept = int64_t{24} << 20;

}  // namespace extrope
