// Registration of ops. A loaded library registers nothing until extrope_register is called. The
// caller registers ops only if their kernels can run, since a registered op goes before other
// implementations.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace extrope {

template <typename Result, typename... Arguments>
constexpr uint64_t count_arguments(Result (*)(Arguments...)) {
  return sizeof...(Arguments);
}

// Throws if an argument was added to an op's schema or taken from it, and not here.
inline void check_count(uint64_t in_schema, uint64_t taken, const char* function,
                        const char* file) {
  if (in_schema == taken) return;
  std::ostringstream text;
  text
      << function << " in " << file << " takes " << taken
      << " arguments, the op's schema in Python has " << in_schema
      << "; options of attention are in csrc/common/attention_args.h, of a rotation in rope_args.h";
  throw std::runtime_error(text.str());
}

// TORCH_BOX of a function, which says what to change if the op's schema does not fit it.
#define EXTROPE_BOX(function)                                                  \
  [](StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {           \
    check_count(num_args, count_arguments(function), #function + 1, __FILE__); \
    TORCH_BOX(function)(stack, num_args, num_outputs);                         \
  }

struct Op {
  const char* name;
  void (*run)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);  // from EXTROPE_BOX
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
