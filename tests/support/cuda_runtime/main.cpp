// Prints what csrc/cuda/runtime/why_not.cu says of the machine that the environment describes.
#include <cstdio>

#include "cuda/runtime/why_not.cu"

int main() {
  // Taken by name at run time: without a use it would not be there.
  auto* volatile kept = &cuDevicePrimaryCtxGetState;
  const std::string why = extrope::why_not();
  std::printf("why: %s\ncurrent: %d\n", why.c_str(), current_device);
  return kept == nullptr;
}
