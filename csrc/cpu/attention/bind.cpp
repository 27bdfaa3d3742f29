// Registers the CPU kernels of the attention over regions.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/attention/call.h"

namespace extrope {
namespace attention {
namespace {

constexpr int64_t kZeroGrain = 1 << 18;  // floats

Tensor zeros_of(const std::vector<int64_t>& shape) {
  Tensor zeros = fresh(shape, ScalarType::Float);
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

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& inv_freq, const OptionalTensor& cu_seqlens,
                                   const OptionalTensor& log_decay, const OptionalTensor& sinks,
                                   const OptionalTensor& query_scale, const OptionalTensor& q_start,
                                   const OptionalTensor& k_start, std::vector<int64_t> starts,
                                   int64_t granularity, std::vector<double> maps,
                                   std::optional<double> softmax_scale, std::optional<double> log_n,
                                   double attention_factor, bool interleaved, double softcap,
                                   std::optional<int64_t> sliding_window, bool float32_results) {
  Forward call({q, k, v, inv_freq, cu_seqlens, log_decay, sinks, query_scale, q_start, k_start},
               {std::move(starts), granularity, std::move(maps), softmax_scale, log_n,
                attention_factor, interleaved, softcap, sliding_window});
  const Tensor out = fresh(call.out_shape(), float32_results ? ScalarType::Float : q.scalar_type());
  const Tensor lse = fresh(call.lse_shape(), ScalarType::Float);
  call.run(out, static_cast<float*>(lse.data_ptr()), float32_results);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& inv_freq,
    const OptionalTensor& cu_seqlens, const OptionalTensor& log_decay, const OptionalTensor& sinks,
    const OptionalTensor& query_scale, const OptionalTensor& q_start, const OptionalTensor& k_start,
    std::vector<int64_t> starts, int64_t granularity, std::vector<double> maps,
    std::optional<double> softmax_scale, std::optional<double> log_n, double attention_factor,
    bool interleaved, double softcap, std::optional<int64_t> sliding_window, bool float32_results) {
  const Options options{inv_freq,
                        cu_seqlens,
                        log_decay,
                        sinks,
                        query_scale,
                        q_start,
                        k_start,
                        {std::move(starts), granularity, std::move(maps), softmax_scale, log_n,
                         attention_factor, interleaved, softcap, sliding_window}};
  AttentionParams p = make_params(q, k, v, options);
  const bool packed = cu_seqlens.has_value();
  check_like(dout, q, p.v.head_dim, "dout", "q");
  check_like(out, q, p.v.head_dim, "out", "q");
  p.dout = view(dout, packed, "dout");
  p.out = view(out, packed, "out");
  p.lse = check_lse(p, lse, "lse");
  if (dlse.has_value()) p.dlse = check_lse(p, *dlse, "dlse");
  const Rotation rotation(p, rotation_args(options), /*keys_ahead=*/false);
  const Tensor dq = fresh(shape(q, p.head_dim), ScalarType::Float);
  const Tensor dk = zeros_of(shape(k, p.head_dim)), dv = zeros_of(shape(v, p.v.head_dim));
  p.dq = view(dq, packed, "dq");
  p.dk = view(dk, packed, "dk");
  p.dv = view(dv, packed, "dv");
  if (p.heads_q > 0) run_backward(p, kernels(p.dtype));
  if (float32_results || p.dtype == DType::f32) return {dq, dk, dv};
  const auto narrow = [&](const Tensor& x) { return torch::stable::to(x, q.scalar_type()); };
  return {narrow(dq), narrow(dk), narrow(dv)};
}

}  // namespace

}  // namespace attention

const Ops ops{
    {"attention_fwd", TORCH_BOX(&attention::forward)},
    {"attention_bwd", TORCH_BOX(&attention::backward)},
};

}  // namespace extrope
