// The entry point of the CUDA library.

#include <exception>
#include <string>

#include "common/ops.h"
#include "cuda/runtime/why_not.h"

extern "C" __attribute__((visibility("default"))) const char* extrope_signatures() {
  return extrope::signatures();
}

// Registers the ops if their kernels can run; else returns why not in one line. Without a GPU the
// driver is not called.
extern "C" __attribute__((visibility("default"))) const char* extrope_register(int has_gpu) {
  static std::string why;
  try {
    why = has_gpu ? extrope::why_not() : "";
    if (!why.empty()) return why.c_str();
    extrope::register_ops("CUDA");
    return nullptr;
  } catch (const std::exception& error) {
    why = error.what();
    return why.c_str();
  }
}
