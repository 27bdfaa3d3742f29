// Fresh tensors for the results of an operation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "common/tensor_args.h"

namespace extrope {

struct Layout {
  int64_t sizes[4], strides[4];
};

// That of torch.empty_like(x): x's own where it is dense, else dense in the order of its strides.
// false where an order is torch's to say: x is expanded.
inline bool layout_like(const Tensor& x, Layout& like) {
  const int64_t dim = x.dim();
  int64_t order[4], strides[4];
  for (int64_t i = 0; i < dim; ++i) {
    order[i] = i, like.sizes[i] = x.size(i), strides[i] = x.stride(i);
    if (like.sizes[i] > 1 && strides[i] == 0) return false;
  }
  std::sort(order, order + dim, [&](int64_t a, int64_t b) {
    if (strides[a] != strides[b]) return strides[a] < strides[b];
    return like.sizes[a] != like.sizes[b] ? like.sizes[a] < like.sizes[b] : a > b;
  });
  bool dense = true;
  int64_t stride = 1;
  for (int64_t n = 0; n < dim; ++n) {
    const int64_t i = order[n];
    dense = dense && (like.sizes[i] == 1 || strides[i] == stride);
    like.strides[i] = stride;
    stride *= like.sizes[i];
  }
  if (dense) std::copy_n(strides, dim, like.strides);
  return true;
}

inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dim, int32_t dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type,
                                                  like.get_device(), &handle));
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& x) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

// empty_like by the shortest way: through the dispatcher it takes longer than rotating one token.
inline Tensor new_like(const Tensor& x) {
  Layout like;
  if (x.numel() == 0 || !layout_like(x, like)) return torch::stable::empty_like(x);
  return empty_strided(x, like.sizes, like.strides, x.dim(), dtype_code(x));
}

inline Tensor no_tensor(const Tensor& like, int32_t dtype) {
  const int64_t zero = 0, one = 1;
  return empty_strided(like, &zero, &one, 1, dtype);
}

// The results of q and k, which the kernel of `p` is to write; empty in place of a k that is none.
template <Tensor (*make_like)(const Tensor&), typename Params>
std::tuple<Tensor, Tensor> make_outputs(Params& p, const Tensor& q, const OptionalTensor& k,
                                        bool packed) {
  Tensor out_q = make_like(q);
  Tensor out_k = k.has_value() ? make_like(*k) : no_tensor(q, dtype_code(q));
  set_output(p.tensors[0], out_q, packed);
  if (k.has_value()) set_output(p.tensors[1], out_k, packed);
  return {out_q, out_k};
}

}  // namespace extrope
