// The largest result that the processor's caches should keep.
#pragma once

#include <cstdint>

namespace extrope {

// In bytes. Hardly any of a larger result is still cached when it is read, and streaming stores
// save more than they cost. Measured with cores that share 32 MiB: a rotation and a read of its
// result took as long with them as without between 16 and 21 MiB, longer below and less above.
constexpr int64_t kMostCached = int64_t{24} << 20;

}  // namespace extrope
