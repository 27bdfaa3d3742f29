// Which of the compiled instruction sets the CPU kernels use on this processor.
#pragma once

#include <cstdint>

namespace extrope {

enum Capability : int64_t { kBaseline, kAvx2, kAvx512 };

// EXTROPE_CPU_CAPABILITY lowers the choice, for tests of the narrower kernels on a wider processor.
Capability capability();

}  // namespace extrope
