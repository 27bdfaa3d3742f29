// Ops as functions that Python calls past PyTorch's dispatcher, which takes longer than the work on
// one token: see extrope_kernels/ops/_shared/direct.py.
//
// Tensors are read by DLPack's exchange functions. Nothing here needs Python's headers or links to
// Python: one library serves them all, and C++ programs without one.
#pragma once

#include <optional>

#include "common/tensor_view.h"
#include "cpu/runtime/dlpack.h"

namespace extrope {

// Python's, as extrope_direct is given them.
struct Python {
  const dlpack::ExchangeAPI* tensors;
  void *none, *done;  // None and True
  int64_t (*tuple_size)(void* tuple);
  void* (*tuple_item)(void* tuple, int64_t i);  // borrowed
  double (*as_double)(void* number);
  void (*increase_refcount)(void* object);
  void* (*error)();  // that is raised, or nullptr
  void (*clear_error)();
  void* (*release)();  // its lock, for other threads; returns what takes it back
  void (*take_back)(void* state);
};

extern Python python;

// What a tensor of Python holds; nothing for None.
OptionalView view_of(void* object);

// The items of a tuple, from left to right; past its end there are Nones.
class Items {
 public:
  explicit Items(void* tuple) : tuple_(tuple), count_(python.tuple_size(tuple)) {}

  OptionalView optional_tensor() { return view_of(next()); }
  TensorView tensor() { return optional_tensor().value(); }
  double number();
  std::optional<double> optional_number();
  int64_t whole_number();
  std::optional<int64_t> optional_whole_number();
  bool flag() { return next() == python.done; }
  int64_t left() const { return count_ - next_; }

 private:
  void* next() { return next_ == count_ ? python.none : python.tuple_item(tuple_, next_++); }

  void* tuple_;
  int64_t count_, next_ = 0;
};

// Work on them holds on to Python's lock: another thread could keep it for longer than that takes.
constexpr int64_t kFewElements = 32 * 1024;

// While it lives, and `wanted`, other threads of Python run, and nothing of Python's may be read.
class WithoutPython {
 public:
  explicit WithoutPython(bool wanted) : state_(wanted ? python.release() : nullptr) {}
  ~WithoutPython() {
    if (state_) python.take_back(state_);
  }
  WithoutPython(const WithoutPython&) = delete;

 private:
  void* const state_;
};

// run(where the results go, numbers, tensors); what a function of Python returns: True, or None
// where the op itself has to be called, which says what is wrong.
template <typename Run>
void* run_directly(void* const* args, const Run& run) {
  void* result = python.done;
  try {
    run(Items(args[0]), Items(args[1]), Items(args[2]));
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
      void* /*self*/, void* const* args, int64_t /*count*/)
