// The entry point of the CUDA library.

#include <exception>
#include <string>

#include "cuda/runtime/ops.h"
#include "cuda/runtime/why_not.h"

namespace extrope {
namespace {

// The library's handle is never deleted: that would take the ops back.
bool register_ops() {
  TorchLibraryHandle library = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_library_init_impl("extrope", "CUDA", __FILE__, __LINE__, &library));
  for (const Op& op : all_ops()) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library, op.name, op.run, TORCH_ABI_VERSION));
  }
  return true;
}

}  // namespace
}  // namespace extrope

// Registers the ops where their kernels can run; else returns why not, in one line. Without a GPU
// nothing is asked of the driver.
extern "C" __attribute__((visibility("default"))) const char* extrope_cuda_register(int has_gpu) {
  static std::string why;
  try {
    why = has_gpu ? extrope::why_not() : "";
    if (!why.empty()) return why.c_str();
    [[maybe_unused]] static const bool registered = extrope::register_ops();
    return nullptr;
  } catch (const std::exception& error) {
    why = error.what();
    return why.c_str();
  }
}
