// The permutation op on torch tensors, with every check, for the CPU and the CUDA library alike.
//
// The schema is defined in Python (extrope_kernels/ops/permute/schema.py); a library registers
// PermuteOps<launch> for its device, where launch(params, device_index) runs the kernel.
#pragma once

#include <tuple>

#include "common/outputs.h"
#include "common/permute_params.h"
#include "common/tensor_args.h"

namespace extrope::permute {

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("permute", condition, message...);
}

inline int32_t element_size(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
      return 8;
    default:
      require(false, "q must be float32, bfloat16, float16 or float64");
  }
  return 0;
}

inline void set_permutations(PermuteParams& p, const Tensor& permutations, const Tensor& q,
                             const OptionalTensor& k) {
  require(p.head_dim >= 1 && p.head_dim <= kMaxPermutedDim, "head_dim must be from 1 to ",
          kMaxPermutedDim, ", got ", p.head_dim);
  require(permutations.scalar_type() == ScalarType::Long, "permutations must be int64");
  require(permutations.get_device() == q.get_device(), "permutations must be on q's device");
  const int64_t heads = p.tensors[0].heads;
  p.rows = permutations.dim() == 2 ? permutations.size(0) : 0;
  require(p.rows > 0 && permutations.size(1) == p.head_dim && heads % p.rows == 0,
          "permutations must be (heads, ", p.head_dim, ") with heads a divisor of ", heads,
          ", got ", shape_of(permutations));
  require(!k.has_value() || p.tensors[1].heads == p.rows,
          "permutations must have a row for each of the ", p.tensors[1].heads, " k heads, got ",
          p.rows, " rows");
  require(permutations.stride(1) == 1 || p.head_dim == 1,
          "permutations must be contiguous in its last dimension");
  p.permutations = static_cast<const int64_t*>(permutations.data_ptr());
  p.permutation_row = permutations.stride(0);
}

inline void set_integer_positions(PermuteParams& p, const Tensor& positions, const Tensor& q,
                                  int64_t sequences) {
  const ScalarType type = positions.scalar_type();
  require(type == ScalarType::Int || type == ScalarType::Long, "positions must be int32 or int64");
  require(positions.get_device() == q.get_device(), "positions must be on q's device");
  p.position_type = type == ScalarType::Int ? PositionType::i32 : PositionType::i64;
  require(set_positions(p, positions, sequences), "positions must be (", p.seqlen, ",), (", p.batch,
          ", ", p.seqlen, ") or (", sequences, ",) offsets, got shape ", shape_of(positions));
}

inline PermuteParams make_params(const Tensor& q, const OptionalTensor& k,
                                 const Tensor& permutations, const OptionalTensor& positions,
                                 const OptionalTensor& cu_seqlens) {
  PermuteParams p{};
  const bool packed = cu_seqlens.has_value();
  p.element_size = element_size(q);
  check_rows("permute", q, packed, "q");
  set_input(p.tensors[p.num_tensors++], q, packed);
  if (k.has_value()) {
    check_rows("permute", *k, packed, "k");
    check_matching("permute", *k, q, "k");
    set_input(p.tensors[p.num_tensors++], *k, packed);
  }
  p.batch = packed ? 1 : q.size(0);
  p.seqlen = q.size(packed ? 0 : 1);
  p.head_dim = q.size(q.dim() - 1);
  const int64_t sequences = packed ? set_cu_seqlens("permute", p, *cu_seqlens, q) : p.batch;
  set_permutations(p, permutations, q, k);
  if (positions.has_value()) set_integer_positions(p, *positions, q, sequences);
  return p;
}

// The op, for a device whose kernel is started by `launch`.
template <void (*launch)(const PermuteParams&, int device_index)>
struct PermuteOps {
  static std::tuple<Tensor, Tensor> forward(const Tensor& q, const OptionalTensor& k,
                                            const Tensor& permutations,
                                            const OptionalTensor& positions,
                                            const OptionalTensor& cu_seqlens, int64_t offset,
                                            bool inverse) {
    const bool packed = cu_seqlens.has_value();
    PermuteParams p = make_params(q, k, permutations, positions, cu_seqlens);
    p.offset = offset;
    p.inverse = inverse;
    const std::tuple<Tensor, Tensor> outs = make_outputs("permute", p, q, k, packed);
    if (p.batch * p.seqlen > 0) launch(p, q.get_device());
    return outs;
  }
};

}  // namespace extrope::permute
