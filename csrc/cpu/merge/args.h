// From the tensors of a merge to MergeParams, with every check, before any kernel starts.
#pragma once

#include <string>
#include <vector>

#include "common/tensor_args.h"
#include "cpu/merge/kernel.h"

namespace extrope::merge {

constexpr const char* kOp = "merge_attention";

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of(kOp, condition, message...);
}

class Args {
 public:
  Args(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, bool in_place)
      : in_place_(in_place) {
    require(!outs.empty(), "outs must hold at least one tensor, got none");
    require(lses.size() == outs.size(), "lses must hold one tensor for each of the ", outs.size(),
            " outs, got ", lses.size());
    const TensorView out(outs[0]), lse(lses[0]);
    set_sizes(out, lse);
    sets_.reserve(outs.size());
    for (size_t n = 0; n < outs.size(); ++n) {
      const TensorView here(outs[n]), its_lse(lses[n]);
      check(here, out, its_lse, lse, n);
      sets_.push_back(rows_of(here, its_lse));
    }
    if (in_place) {
      require(!overlaps_itself(out) && !overlaps_itself(lse),
              "outs[0] and lses[0] must not be expanded to be written to");
    }
  }

  // The sets, to be merged into out and lse. Lives as long as this.
  MergeParams params(const Tensor& out, const Tensor& lse) {
    p_.sets = sets_.data(), p_.num_sets = static_cast<int64_t>(sets_.size());
    p_.merged = rows_of(out, lse);
    p_.in_place = in_place_;
    p_.wide = p_.lse_is_f64 || p_.merged.dtype == DType::f64;
    return p_;
  }

 private:
  void set_sizes(const TensorView& out, const TensorView& lse) {
    const int64_t d = out.dim();
    require(d == 3 || d == 4,
            "outs must be (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim), "
            "got shape ",
            shape_of(out));
    p_.batch = d == 4 ? out.size(0) : 1;
    p_.seqlen = out.size(d - 3), p_.heads = out.size(d - 2), p_.head_dim = out.size(d - 1);
    p_.lse_is_f64 = lse.scalar_type() == ScalarType::Double;
    require(p_.lse_is_f64 || lse.scalar_type() == ScalarType::Float,
            "lses must be float32 or float64");
  }

  void check(const TensorView& out, const TensorView& first, const TensorView& lse,
             const TensorView& first_lse, size_t n) const {
    const ScalarType type = out.scalar_type();
    const bool narrower = in_place_ && (type == ScalarType::BFloat16 || type == ScalarType::Half);
    bool same = out.dim() == first.dim() && (narrower || type == first.scalar_type());
    for (int64_t i = 0; same && i < out.dim(); ++i) same = out.size(i) == first.size(i);
    require(same && out.is_cpu(), "outs[", n, "] must be like outs[0], got shape ", shape_of(out));
    const int64_t d = out.dim();
    require(out.stride(d - 1) == 1 || out.size(d - 1) <= 1 || out.numel() == 0, "outs[", n,
            "] must be contiguous in its last dimension, got stride ", out.stride(d - 1));
    require(lse.dim() == d - 1 && lse.size(d - 2) == p_.seqlen && lse.size(d - 3) == p_.heads &&
                (d == 3 || lse.size(0) == p_.batch) && lse.is_cpu() &&
                lse.scalar_type() == first_lse.scalar_type(),
            "lses[", n,
            "] must be (batch, heads, seqlen), or packed (heads, total), like lses[0], ",
            "got shape ", shape_of(lse));
  }

  static MergeRows rows_of(const TensorView& out, const TensorView& lse) {
    const int64_t d = out.dim();
    return {out.data_ptr(),
            d == 4 ? out.stride(0) : 0,
            out.stride(d - 3),
            out.stride(d - 2),
            dtype_of_rows(kOp, out, "outs"),
            lse.data_ptr(),
            d == 4 ? lse.stride(0) : 0,
            lse.stride(d - 3),
            lse.stride(d - 2)};
  }

  bool in_place_;
  std::vector<MergeRows> sets_;
  MergeParams p_{};
};

}  // namespace extrope::merge
