// Checks and reads torch tensors, for the bindings of several operations. `op` begins every error.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/token_params.h"

namespace extrope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
// The name for them in attention and decode.
using TensorView = Tensor;
using OptionalView = OptionalTensor;

template <typename... Message>
void require_of(const char* op, bool condition, const Message&... message) {
  if (!condition) [[unlikely]] {
    std::ostringstream text;
    text << op << ": ";
    (text << ... << message);
    throw std::runtime_error(text.str());
  }
}

// Becomes text only if a check fails: making text takes longer than a small rotation.
struct Shape {
  const Tensor& x;
};

inline Shape shape_of(const Tensor& x) { return {x}; }

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << "(";
  for (int64_t i = 0; i < shape.x.dim(); ++i) text << (i ? ", " : "") << shape.x.size(i);
  return text << ")";
}

// Returns true if rows of x are expanded, or lie over each other.
inline bool overlaps_itself(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) > 1) dims.emplace_back(x.stride(i), x.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t end = 0;  // of what the shorter strides reach
  for (const auto& [stride, size] : dims) {
    if (stride <= end) return true;
    end += stride * (size - 1);
  }
  return false;
}

inline int64_t element_size(ScalarType type) {
  if (type == ScalarType::Float8_e4m3fn) return 1;
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// A dimension of two tensors: indices of the first minus those of the second, times a stride.
struct Difference {
  int64_t stride, least, most;
};

// Returns true if some differences add up to `distance`.
inline bool is_reached(int64_t distance, const std::vector<Difference>& all, size_t first = 0) {
  if (first == all.size()) return distance == 0;
  const Difference& x = all[first];
  int64_t least = 0, most = 0;  // of the differences that follow
  for (size_t i = first + 1; i < all.size(); ++i) {
    least += all[i].stride * all[i].least, most += all[i].stride * all[i].most;
  }
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  const int64_t begin = std::max(x.least, -floor_div(most - distance, x.stride));
  const int64_t end = std::min(x.most, floor_div(distance - least, x.stride));
  for (int64_t n = begin; n <= end; ++n) {
    if (is_reached(distance - n * x.stride, all, first + 1)) return true;
  }
  return false;
}

// Returns true if two tensors have a byte in common. Their strides may differ; those of the caches
// that occur divide one another, so few differences are tried.
inline bool share_memory(const Tensor& x, const Tensor& y) {
  if (x.numel() == 0 || y.numel() == 0) return false;
  std::vector<Difference> all;
  int64_t spans[2] = {0, 0};  // bytes from the first to the last
  const auto add = [&](const Tensor& t, bool second) {
    const auto dimension = [&](int64_t stride, int64_t size) {
      if (stride == 0 || size == 1) return;
      const int64_t most = size - 1;
      spans[second] += most * stride;
      all.push_back({stride, second ? -most : 0, second ? 0 : most});
    };
    const int64_t bytes = element_size(t.scalar_type());
    for (int64_t i = 0; i < t.dim(); ++i) dimension(t.stride(i) * bytes, t.size(i));
    dimension(1, bytes);
  };
  add(x, false), add(y, true);
  const int64_t distance =
      static_cast<const char*>(y.data_ptr()) - static_cast<const char*>(x.data_ptr());
  if (distance > spans[0] || -distance > spans[1]) return false;
  std::sort(all.begin(), all.end(),
            [](const auto& a, const auto& b) { return a.stride > b.stride; });
  std::vector<Difference> merged;
  for (const Difference& one : all) {
    if (!merged.empty() && merged.back().stride == one.stride) {
      merged.back().least += one.least, merged.back().most += one.most;
    } else {
      merged.push_back(one);
    }
  }
  return is_reached(distance, merged);
}

inline void check_rows(const char* op, const Tensor& x, bool packed, const char* name) {
  require_of(
      op, x.dim() == (packed ? 3 : 4), name, " must be ",
      packed ? "(total, heads, head_dim) with cu_seqlens" : "(batch, seqlen, heads, head_dim)",
      ", got shape ", shape_of(x));
  const int64_t last = x.dim() - 1;
  require_of(op, x.stride(last) == 1 || x.size(last) <= 1 || x.numel() == 0, name,
             " must be contiguous in its last dimension, got stride ", x.stride(last));
}

inline void check_matching(const char* op, const Tensor& x, const Tensor& q, const char* name) {
  require_of(op, x.scalar_type() == q.scalar_type(), name, " must have q's dtype");
  require_of(op, x.get_device() == q.get_device(), name, " must be on q's device");
  bool same = x.dim() == q.dim();
  for (int64_t i = 0; same && i < q.dim(); ++i) same = i == q.dim() - 2 || x.size(i) == q.size(i);
  require_of(op, same, name, " must have q's shape ", shape_of(q), " but for the heads, got ",
             shape_of(x));
}

// `Params`: TokenParams or a similar struct.
template <typename Params>
int64_t set_cu_seqlens(const char* op, Params& p, const Tensor& cu_seqlens, const Tensor& q) {
  require_of(op,
             cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
                 cu_seqlens.size(0) >= 2,
             "cu_seqlens must be int32 (sequences + 1,), got shape ", shape_of(cu_seqlens));
  require_of(op, cu_seqlens.get_device() == q.get_device() && cu_seqlens.is_contiguous(),
             "cu_seqlens must be contiguous on q's device");
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  p.num_sequences = cu_seqlens.size(0) - 1;
  return p.num_sequences;
}

// Returns the dtype of rows in any supported type.
inline DType dtype_of_rows(const char* op, const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      require_of(op, false, name, " must be float32, bfloat16, float16 or float64");
  }
  return DType::f32;
}

// Returns q's dtype, for operations that compute in float32.
inline DType dtype_of(const char* op, const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      require_of(op, false, "q must be float32, bfloat16 or float16");
  }
  return DType::f32;
}

// Returns false if the positions do not fit the tokens. As in ops/_math/positions.py, one entry
// per token means positions; otherwise one entry per sequence means offsets.
inline bool set_positions(TokenParams& p, const Tensor& positions, int64_t sequences) {
  const int64_t dim = positions.dim(), rows = dim >= 1 ? positions.size(0) : -1;
  const int64_t columns = dim == 2 ? positions.size(1) : -1;
  p.positions = positions.data_ptr();
  if (dim == 1 && rows == p.seqlen) {
    p.position_seq = positions.stride(0);
  } else if (dim == 2 && (rows == p.batch || rows == 1) && columns == p.seqlen) {
    p.position_batch = rows > 1 ? positions.stride(0) : 0;
    p.position_seq = positions.stride(1);
  } else if (rows == sequences && (dim == 1 || (dim == 2 && columns == 1))) {
    p.positions_are_offsets = true;
    p.position_batch = positions.stride(0);
  } else {
    return false;
  }
  return true;
}

// `to`: a RopeTensor or a similar struct.
template <typename Place>
void set_input(Place& to, const Tensor& in, bool packed) {
  const int64_t d = in.dim();
  to.in = in.data_ptr();
  to.in_batch = packed ? 0 : in.stride(0);
  to.in_seq = in.stride(d - 3);
  to.in_head = in.stride(d - 2);
  to.heads = in.size(d - 2);
}

template <typename Place>
void set_output(Place& to, const Tensor& out, bool packed) {
  const int64_t d = out.dim();
  to.out = out.data_ptr();
  to.out_batch = packed ? 0 : out.stride(0);
  to.out_seq = out.stride(d - 3);
  to.out_head = out.stride(d - 2);
}

// Returns true if boundaries, which the host can read, rise from 0.
inline bool rise_from_zero(const int32_t* cu_seqlens, int64_t sequences) {
  return cu_seqlens[0] == 0 && std::is_sorted(cu_seqlens, cu_seqlens + sequences + 1);
}

template <typename Params>
void check_boundaries(const char* op, const Params& p, int64_t tokens) {
  require_of(
      op, rise_from_zero(p.cu_seqlens, p.num_sequences) && p.cu_seqlens[p.num_sequences] == tokens,
      "cu_seqlens must rise from 0 to the number of tokens ", tokens);
}

}  // namespace extrope
