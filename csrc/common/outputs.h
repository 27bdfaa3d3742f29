// Allocates tensors for the results of an operation, by PyTorch's allocator.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <iomanip>
#include <sstream>
#include <tuple>
#include <vector>

#include "common/tensor_args.h"

namespace extrope {

// Returns make(), a tensor of these sizes. The stable ABI of PyTorch before 2.13 loses PyTorch's
// message if there is no memory.
template <typename Make>
Tensor allocate(const char* op, const std::vector<int64_t>& sizes, ScalarType type,
                const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    double bytes = static_cast<double>(element_size(type));
    std::ostringstream shape;
    for (size_t i = 0; i < sizes.size(); ++i) {
      bytes *= static_cast<double>(sizes[i]);
      shape << (i ? ", " : "") << sizes[i];
    }
    std::ostringstream count;
    count << std::fixed << std::setprecision(0) << bytes;
    require_of(op, false, "cannot allocate ", count.str(), " bytes for a result of shape (",
               shape.str(), ")");
    throw;
  }
}

// Returns a contiguous tensor on like's device.
inline Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type,
                    const char* op = "extrope") {
  return allocate(op, sizes, type, [&] { return torch::stable::new_empty(like, sizes, type); });
}

// Returns a contiguous tensor on the CPU.
inline Tensor fresh(const std::vector<int64_t>& sizes, ScalarType type,
                    const char* op = "extrope") {
  return allocate(op, sizes, type, [&] { return torch::stable::empty(sizes, type); });
}

// Returns a tensor like x with contiguous rows: torch.empty_like(x), or if rows of x overlap, which
// may give it others, a contiguous one.
inline Tensor fresh_like(const Tensor& x, const char* op = "extrope") {
  std::vector<int64_t> sizes(x.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = x.size(i);
  const Tensor out =
      allocate(op, sizes, x.scalar_type(), [&] { return torch::stable::empty_like(x); });
  const int64_t last = x.dim() - 1;
  const bool rows = out.stride(last) == 1 || x.size(last) <= 1;
  return rows ? out : fresh(x, sizes, x.scalar_type(), op);
}

// Allocates the results of q and k for the kernel of `p`; empty for a k that is none.
template <typename Params>
std::tuple<Tensor, Tensor> make_outputs(const char* op, Params& p, const Tensor& q,
                                        const OptionalTensor& k, bool packed) {
  Tensor out_q = fresh_like(q, op);
  Tensor out_k = k.has_value() ? fresh_like(*k, op) : fresh(q, {0}, q.scalar_type(), op);
  set_output(p.tensors[0], out_q, packed);
  if (k.has_value()) set_output(p.tensors[1], out_k, packed);
  return {out_q, out_k};
}

}  // namespace extrope
