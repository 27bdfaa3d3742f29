// The largest result that the processor's caches are counted on to keep.
#pragma once

#include <cstdint>

namespace extrope {

// Bytes. Of a larger result hardly any is still cached when it is read, and streaming stores save
// more than they cost. Measured where cores share 32 MiB: a rotation and a read of what it wrote
// took as long with them as without between 16 and 21 MiB, more below and less above.
constexpr int64_t kMostCached = int64_t{24} << 20;

}  // namespace extrope
