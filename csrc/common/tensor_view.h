// A tensor's memory and layout, read once: through PyTorch's stable ABI each is a call, and all
// that an op checks take as long as rotating a token.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace extrope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class TensorView {
 public:
  // Of a tensor that outlives it.
  TensorView(const Tensor& x)
      : data_(x.data_ptr()),
        dim_(x.dim()),
        type_(x.scalar_type()),
        device_(x.get_device()),
        is_cpu_(x.is_cpu()) {
    int64_t *sizes, *strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &strides));
    sizes_ = sizes, strides_ = strides;
  }
  TensorView(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType type,
             int device, bool is_cpu)
      : data_(data),
        sizes_(sizes),
        strides_(strides),
        dim_(dim),
        type_(type),
        device_(device),
        is_cpu_(is_cpu) {}

  void* data_ptr() const { return data_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  ScalarType scalar_type() const { return type_; }
  int get_device() const { return device_; }
  bool is_cpu() const { return is_cpu_; }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
    return count;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
      expected *= sizes_[i];
    }
    return true;
  }

 private:
  void* data_;
  const int64_t *sizes_, *strides_;
  int64_t dim_;
  ScalarType type_;
  int device_;
  bool is_cpu_;
};

using OptionalView = std::optional<TensorView>;

}  // namespace extrope
