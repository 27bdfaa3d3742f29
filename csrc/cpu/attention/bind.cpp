// Registers the CPU kernels of the attention over regions.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/attention/args.h"
#include "cpu/attention/run.h"

namespace extrope {
namespace attention {
namespace {

constexpr const char* kOp = "attention";
#define EXTROPE_CALL \
  EXTROPE_CALL_TENSORS(EXTROPE_PARAMETER) EXTROPE_STARTS(EXTROPE_PARAMETER) EXTROPE_OPTIONS
#define EXTROPE_ARGS                                                                               \
  Args {                                                                                           \
    {EXTROPE_CALL_TENSORS(EXTROPE_VALUE)}, EXTROPE_STARTS(EXTROPE_VALUE) EXTROPE_READ_OPTIONS(kOp) \
  }
constexpr int64_t kZeroGrain = 1 << 18;  // floats

Tensor zeros_of(const std::vector<int64_t>& shape) {
  Tensor zeros = fresh(shape, ScalarType::Float, kOp);
  float* data = static_cast<float*>(zeros.data_ptr());
  torch::stable::parallel_for(0, zeros.numel(), kZeroGrain, [&](int64_t begin, int64_t end) {
    std::fill(data + begin, data + end, 0.0f);
  });
  return zeros;
}

std::vector<int64_t> shape(const Tensor& x, int64_t head_dim) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(head_dim);
  return sizes;
}

std::vector<int64_t> lse_shape(const AttentionParams& p, bool packed) {
  if (packed) return {p.heads_q, p.seqlen_q};
  return {p.batch, p.heads_q, p.seqlen_q};
}

EXTROPE_FUNCTION(TwoTensors, forward, const Tensor& q, const Tensor& k,
                 const Tensor& v EXTROPE_CALL) {
  const Args args = EXTROPE_ARGS;
  AttentionParams p = make_params(q, k, v, args);
  const std::vector<double> maps_of_p = args.pair_maps_of(p);
  const RotationTables rotation(p, args.rotation(), rotates_ahead(p.dtype));
  p.float32_out = args.options.float32_results;
  const Tensor out =
      fresh(shape(q, p.v.head_dim), p.float32_out ? ScalarType::Float : q.scalar_type(), kOp);
  const Tensor lse = fresh(lse_shape(p, args.packed()), ScalarType::Float, kOp);
  p.out = view(out, args.packed(), "out");
  p.lse = static_cast<float*>(lse.data_ptr());
  if (p.heads_q > 0) run_forward(p, kernels(p.dtype));
  return {out, lse};
}

EXTROPE_FUNCTION(ThreeTensors, backward, const Tensor& dout, const OptionalTensor& dlse,
                 const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const Tensor& lse EXTROPE_CALL) {
  const Args args = EXTROPE_ARGS;
  AttentionParams p = make_params(q, k, v, args);
  const std::vector<double> maps_of_p = args.pair_maps_of(p);
  const bool packed = args.packed();
  check_like(dout, q, p.v.head_dim, "dout", "q");
  check_like(out, q, p.v.head_dim, "out", "q");
  p.dout = view(dout, packed, "dout");
  p.out = view(out, packed, "out");
  p.lse = check_lse(p, lse, "lse");
  if (dlse.has_value()) p.dlse = check_lse(p, *dlse, "dlse");
  const RotationTables rotation(p, args.rotation(), /*keys_ahead=*/false);
  const Tensor dq = fresh(shape(q, p.head_dim), ScalarType::Float, kOp);
  const Tensor dk = zeros_of(shape(k, p.head_dim)), dv = zeros_of(shape(v, p.v.head_dim));
  p.dq = view(dq, packed, "dq");
  p.dk = view(dk, packed, "dk");
  p.dv = view(dv, packed, "dv");
  if (p.heads_q > 0) run_backward(p, kernels(p.dtype));
  if (args.options.float32_results || p.dtype == DType::f32) return {dq, dk, dv};
  const auto narrow = [&](const Tensor& x) { return torch::stable::to(x, q.scalar_type()); };
  return {narrow(dq), narrow(dk), narrow(dv)};
}

}  // namespace
}  // namespace attention

const Ops ops{
    EXTROPE_OP("attention_fwd", attention::forward),
    EXTROPE_OP("attention_bwd", attention::backward),
};

}  // namespace extrope
