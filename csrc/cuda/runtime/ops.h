// How a binding names its ops: they are registered not when the library is loaded but when
// extrope_cuda_register (bind.cpp) is called, since a registered op goes before what would serve
// where its kernel cannot run.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <vector>

namespace extrope {

struct Op {
  const char* name;
  void (*run)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);  // of TORCH_BOX
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

}  // namespace extrope
