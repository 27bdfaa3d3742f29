// Converts torch tensors to PermuteParams and the permutations' cycles, with all checks.
#pragma once

#include <vector>

#include "common/tensor_args.h"
#include "cpu/permute/kernel.h"

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

// Finds the cycles of a row; every dim occurs once if and only if it is a permutation.
class Decomposition {
 public:
  explicit Decomposition(const PermuteParams& p)
      : step_(p.rows * p.head_dim, -1), flat_(step_.size()), end_(step_.size()) {
    for (int64_t row = 0; row < p.rows; ++row) {
      read_row(p, row);
      find_cycles(row * p.head_dim, p.head_dim);
    }
  }

  PermuteCycles cycles() const { return {step_.data(), flat_.data(), end_.data()}; }

 private:
  void read_row(const PermuteParams& p, int64_t row) {
    const int64_t* from = p.permutations + row * p.permutation_row;
    int32_t* step = &step_[row * p.head_dim];
    int64_t met = 0;
    for (int64_t c = 0; c < p.head_dim; ++c) {
      const int64_t source = from[c];
      if (source < 0 || source >= p.head_dim) break;
      met += step[source] < 0;
      step[source] = static_cast<int32_t>(c);  // the inverse, which shows repeated dims
    }
    require(met == p.head_dim, "permutations must hold 0 to ", p.head_dim - 1,
            " once in every row, row ", row, " does not");
    if (p.inverse) return;
    for (int64_t c = 0; c < p.head_dim; ++c) step[c] = static_cast<int32_t>(from[c]);
  }

  void find_cycles(int64_t row, int64_t dim) {
    std::vector<bool> met(dim);
    int64_t at = 0;
    for (int64_t first = 0; first < dim; ++first) {
      if (met[first]) continue;
      const int64_t begin = at;
      for (int64_t c = first; !met[c]; c = step_[row + c]) {
        met[c] = true;
        flat_[row + at++] = static_cast<int32_t>(c);
      }
      end_[row + begin] = static_cast<int32_t>(at);
    }
  }

  std::vector<int32_t> step_, flat_, end_;
};

}  // namespace extrope::permute
