// Registration of ops. A loaded library registers nothing until extrope_register is called. The
// caller registers ops only if their kernels can run, since a registered op goes before other
// implementations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

namespace extrope {

// A list of an op's arguments has X(type, name) for each: LIST(X). These make of it parameters
// after a function's first, members of a struct, and the values of those.
#define EXTROPE_PARAMETER(type, name) , type name
#define EXTROPE_MEMBER(type, name) type name;
#define EXTROPE_VALUE(type, name) name,

#define EXTROPE_TEXT(...) #__VA_ARGS__

// Begins the function of an op, EXTROPE_FUNCTION(Result, name, parameters...) { ... }. As it loads
// the library, Python compares the names of the parameters with the op's schema.
#define EXTROPE_FUNCTION(Result, name, ...)                                   \
  static constexpr const char* name##_parameters = EXTROPE_TEXT(__VA_ARGS__); \
  static Result name(__VA_ARGS__)

// The entry of an op, by the function that EXTROPE_FUNCTION has begun.
#define EXTROPE_OP(op, function) {op, TORCH_BOX(&function), function##_parameters}

using TwoTensors = std::tuple<torch::stable::Tensor, torch::stable::Tensor>;
using ThreeTensors =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;
using FourTensors = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                               torch::stable::Tensor>;

struct Op {
  const char* name;
  void (*run)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);
  const char* parameters;
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

// Returns a line for each op, its name and its function's parameters.
inline const char* signatures() {
  static const std::string text = [] {
    std::string lines;
    for (const Op& op : all_ops()) lines += std::string(op.name) + " " + op.parameters + "\n";
    return lines;
  }();
  return text.c_str();
}

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
