// The entry point of the CUDA ops compiled for the host: they take tensors on the CPU.
#include <exception>
#include <string>

#include "common/ops.h"
#include "cuda/rope/kernel.h"

namespace extrope {

const char* rope_error(int) { return "emulated"; }

}  // namespace extrope

extern "C" __attribute__((visibility("default"))) const char* extrope_register(
    const char* name_space, int) {
  static std::string why;
  try {
    extrope::register_ops(name_space, "CPU");
    return nullptr;
  } catch (const std::exception& error) {
    why = error.what();
    return why.c_str();
  }
}
