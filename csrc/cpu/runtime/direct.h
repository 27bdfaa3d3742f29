// Ops as functions that Python calls past PyTorch's dispatcher, which takes longer than the work on
// one token: see extrope_kernels/ops/_shared/direct.py.
//
// Tensors are read by DLPack's exchange functions. Nothing here needs Python's headers or links to
// Python: one library serves them all, and C++ programs without one.
#pragma once

#include "common/tensor_view.h"
#include "cpu/runtime/dlpack.h"

namespace extrope {

// Python's, as extrope_direct is given them.
struct Python {
  const dlpack::ExchangeAPI* tensors;
  void *none, *done;  // None and True
  double (*as_double)(void* number);
  void (*increase_refcount)(void* object);
  void* (*error)();  // that is raised, or nullptr
  void (*clear_error)();
};

extern Python python;

// The arguments of a call, from left to right; those not given are None.
class DirectArgs {
 public:
  DirectArgs(void* const* args, int64_t count) : next_(args), end_(args + count) {}

  OptionalView optional_tensor();
  double number();
  bool flag() { return next() == python.done; }

 private:
  void* next() { return next_ == end_ ? python.none : *next_++; }

  void* const* next_;
  void* const* end_;
};

// What a function of Python returns: True, or None where the op itself has to be called, which says
// what is wrong.
template <typename Run>
void* run_directly(void* const* args, int64_t count, const Run& run) {
  void* result = python.done;
  try {
    DirectArgs in(args, count);
    run(in);
  } catch (...) {
    python.clear_error();
    result = python.none;
  }
  python.increase_refcount(result);
  return result;
}

}  // namespace extrope

// A function's C name and its arguments, as Python's METH_FASTCALL has them.
#define EXTROPE_DIRECT(name)                                                     \
  extern "C" __attribute__((visibility("default"))) void* extrope_direct_##name( \
      void* /*self*/, void* const* args, int64_t count)
