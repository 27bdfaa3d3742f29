// One call of `attention_fwd`: checked as it is made, then run once its results have memory.
#pragma once

#include <utility>
#include <vector>

#include "cpu/attention/args.h"
#include "cpu/attention/choice.h"
#include "cpu/attention/rotation.h"
#include "cpu/runtime/frequencies.h"

namespace extrope::attention {

constexpr int kTensors = 10;  // of the op's schema

inline RotationArgs rotation_args(const Options& options) {
  const OptionalView& decay = options.log_decay;
  const double factor = options.numbers.attention_factor;
  return {padded_rows(options.inv_freq),
          decay.has_value() ? padded_rows(*decay).values : std::vector<double>(),
          options.numbers.log_n.value_or(0.0), factor * factor};
}

class Forward {
 public:
  // x: the tensors of the op's schema, in its order.
  Forward(const OptionalView (&x)[kTensors], AttentionNumbers numbers)
      : q_(x[0].value()),
        options_{x[3].value(), x[4], x[5], x[6], x[7], x[8], x[9], std::move(numbers)},
        p_(make_params(q_, x[1].value(), x[2].value(), options_)) {}
  Forward(const Forward&) = delete;

  std::vector<int64_t> out_shape() const {
    return shape({p_.batch, p_.seqlen_q, p_.heads_q, p_.v.head_dim});
  }
  std::vector<int64_t> lse_shape() const { return shape({p_.batch, p_.heads_q, p_.seqlen_q}); }
  // How many numbers lse has.
  int64_t rows() const { return p_.batch * p_.seqlen_q * p_.heads_q; }
  int64_t products() const { return rows() * p_.seqlen_k * p_.head_dim; }
  void check_out(const TensorView& out) const { check_like(out, q_, p_.v.head_dim, "out", "q"); }

  // out and lse are contiguous.
  void run(const TensorView& out, float* lse, bool float32_results = false) {
    const Rotation rotation(p_, rotation_args(options_), rotates_ahead(p_.dtype));
    p_.float32_out = float32_results;
    p_.out = view(out, packed(), "out");
    p_.lse = lse;
    if (p_.heads_q > 0) run_forward(p_, kernels(p_.dtype));
  }

 private:
  bool packed() const { return options_.cu_seqlens.has_value(); }
  // Packed tensors have no dimension of sequences.
  std::vector<int64_t> shape(std::vector<int64_t> sizes) const {
    if (packed()) sizes.erase(sizes.begin());
    return sizes;
  }

  const TensorView q_;
  const Options options_;
  AttentionParams p_;
};

}  // namespace extrope::attention
