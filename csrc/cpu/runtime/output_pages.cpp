#include "cpu/runtime/output_pages.h"

#include <algorithm>

#include "cpu/runtime/kept_pages.h"

namespace extrope {
namespace {

void done_with(void* begin, void* bytes) {
  keep_pages({begin, static_cast<int64_t>(reinterpret_cast<uintptr_t>(bytes))});
}

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    default:
      return 2;
  }
}

// The tensor, or none where it is small or there is no memory: torch says that better.
bool large(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t bytes, int32_t dtype,
           AtenTensorHandle* tensor) {
  const Pages pages = take_pages(bytes);
  if (!pages.begin) return false;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      pages.begin, dim, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, tensor,
      aoti_torch_layout_strided(), nullptr, 0, done_with, reinterpret_cast<void*>(pages.bytes)));
  return true;
}

}  // namespace

Tensor fresh_like(const Tensor& x) {
  const int64_t bytes = x.numel() * element_size(x.scalar_type());
  Layout like;
  if (bytes < kLarge || !layout_like(x, like)) return new_like(x);
  AtenTensorHandle tensor;
  const bool made = large(like.sizes, like.strides, x.dim(), bytes, dtype_code(x), &tensor);
  return made ? Tensor(tensor) : new_like(x);
}

Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1, stride = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);  // as torch has them in a tensor of none
  }
  const int64_t dim = static_cast<int64_t>(sizes.size());
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  if (!large(sizes.data(), strides.data(), dim, count * element_size(dtype), code, &tensor)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides.data(), code,
                                                    aoti_torch_device_type_cpu(), -1, &tensor));
  }
  return Tensor(tensor);
}

}  // namespace extrope
