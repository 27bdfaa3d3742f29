#include "cpu/runtime/direct.h"

#include <cmath>
#include <stdexcept>

namespace extrope {

Python python;

namespace {

ScalarType scalar_type(const dlpack::Tensor& x) {
  const auto of = [&](uint8_t code, int bits) {
    return x.code == code && x.bits == bits && x.lanes == 1;
  };
  if (of(dlpack::kBfloat, 16)) return ScalarType::BFloat16;
  if (of(dlpack::kFloat, 16)) return ScalarType::Half;
  if (of(dlpack::kFloat, 32)) return ScalarType::Float;
  if (of(dlpack::kFloat, 64)) return ScalarType::Double;
  if (of(dlpack::kInt, 32)) return ScalarType::Int;
  if (of(dlpack::kInt, 64)) return ScalarType::Long;
  if (of(dlpack::kE4m3fn, 8)) return ScalarType::Float8_e4m3fn;
  throw std::runtime_error("a dtype of no op");
}

}  // namespace

OptionalView view_of(void* object) {
  if (object == python.none) return std::nullopt;
  dlpack::Tensor x;
  if (python.tensors->read(object, &x) != 0 || x.device_type != dlpack::kCPU) {
    throw std::runtime_error("no tensor on the CPU");
  }
  constexpr int kNoIndex = -1;
  const TensorView view(static_cast<char*>(x.data) + x.byte_offset, x.dim, x.sizes, x.strides,
                        scalar_type(x), kNoIndex, /*is_cpu=*/true);
  // Of one that PyTorch knows to be zero nothing is in memory.
  if (!x.data && view.numel() > 0) throw std::runtime_error("a tensor without memory");
  return view;
}

std::optional<double> Items::optional_number() {
  void* object = next();
  if (object == python.none) return std::nullopt;
  const double x = python.as_double(object);
  if (x == -1.0 && python.error()) throw std::runtime_error("no number");
  return x;
}

std::optional<int64_t> Items::optional_whole_number() {
  const std::optional<double> x = optional_number();
  if (!x) return std::nullopt;
  // Larger ones may have been rounded; this one is where the keys of any query begin.
  const bool exact = std::abs(*x) < 0x1p53 || *x == -0x1p62;
  if (!exact || *x != std::floor(*x)) throw std::runtime_error("no whole number");
  return static_cast<int64_t>(*x);
}

double Items::number() { return optional_number().value(); }
int64_t Items::whole_number() { return optional_whole_number().value(); }

}  // namespace extrope

// Says how Python's objects are read, before a function is called with any; false: they cannot be.
extern "C" __attribute__((visibility("default"))) int extrope_direct(
    const extrope::Python* python) {
  extrope::python = *python;
  const extrope::dlpack::ExchangeAPI* tensors = python->tensors;
  return tensors->major_version == extrope::dlpack::kMajorVersion && tensors->read;
}
