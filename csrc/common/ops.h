// Registration of ops. A loaded library registers nothing until extrope_register is called. The
// caller registers ops only if their kernels can run, since a registered op goes before other
// implementations.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <vector>

namespace extrope {

struct Op {
  const char* name;
  void (*run)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);  // from TORCH_BOX
  const char* key = nullptr;  // dispatch key; nullptr: that of the library's device
};

inline std::vector<Op>& all_ops() {
  static std::vector<Op> all;
  return all;
}

struct Ops {
  Ops(std::initializer_list<Op> these) {
    all_ops().insert(all_ops().end(), these.begin(), these.end());
  }
};

// Handles are never deleted: that would unregister their ops.
inline void register_ops(const char* device) {
  for (const Op& op : all_ops()) {
    TorchLibraryHandle library = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("extrope", op.key ? op.key : device,
                                                        __FILE__, __LINE__, &library));
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library, op.name, op.run, TORCH_ABI_VERSION));
  }
}

}  // namespace extrope
