// Registers the CPU kernels of decayed linear attention.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/linear_attention/args.h"
#include "cpu/linear_attention/run.h"
#include "cpu/permute/cycles.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"

namespace extrope {
namespace sweep {
namespace {

constexpr int64_t kDotGrain = 256;       // tokens
constexpr int64_t kStepGrain = 1 << 15;  // floats of states

#define EXTROPE_KERNELS(isa)                                                                    \
  SweepKernels {                                                                                \
    sweep_plan_##isa, sweep_gather_##isa, sweep_part_##isa, sweep_load_##isa, sweep_save_##isa, \
        sweep_dots_##isa                                                                        \
  }

SweepKernels kernels() { return EXTROPE_WIDEST(EXTROPE_KERNELS); }

SweepKernels kernels(const SweepParams& p) {
#if defined(EXTROPE_HAS_BF16)
#define EXTROPE_BF16_KERNELS(isa)                                                               \
  SweepKernels {                                                                                \
    sweep_plan_##isa, sweep_gather_##isa, sweep_part_##isa, sweep_load_##isa, sweep_save_##isa, \
        sweep_dots_avx512                                                                       \
  }
  if (capability() >= kAvx512Bf16 && can_use_tiles(p)) {
    return EXTROPE_WIDEST_BF16(EXTROPE_BF16_KERNELS);
  }
#endif
  return kernels();
}

void step(const SweepParams& p) {
#define EXTROPE_STEP(isa) sweep_step_##isa
  const StepStates kernel = EXTROPE_WIDEST(EXTROPE_STEP);
  const int64_t grain = kStepGrain / std::max<int64_t>(p.score_dim * p.value_dim, 1);
  torch::stable::parallel_for(0, p.batch * p.heads, std::max<int64_t>(grain, 1),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void run(SweepParams& p) {
  if (is_step(p)) return step(p);
  bool not_finite = false;
  p.not_finite = &not_finite;
  Run(p, kernels(p))();
  if (not_finite) Run(p, kernels())();
}

Tensor empty_rows(const SweepParams& p, const Tensor& like, int64_t heads, int64_t dim, bool wide) {
  std::vector<int64_t> sizes{p.batch, p.seqlen, heads, dim};
  if (p.cu_seqlens) sizes.erase(sizes.begin());
  return fresh(sizes, wide ? ScalarType::Float : like.scalar_type());
}

Tensor empty_numbers(const SweepParams& p, const Tensor& like, int64_t heads) {
  std::vector<int64_t> sizes{p.batch, heads, p.seqlen};
  if (p.cu_seqlens) sizes.erase(sizes.begin());
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// Takes x and y by powers of permutations on the way.
void run_permuted(SweepParams& p, PermuteParams by, int64_t offset) {
  require(p.phi_scores, "only a sweep whose scores have the feature map permutes");
  by.offset = offset;
  const permute::Decomposition decomposition(by);
  const PermuteCycles cycles = decomposition.cycles();
  p.permute = &by, p.cycles = &cycles;
  run(p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_sweep(
    Tensor x, Tensor y, Tensor w, OptionalTensor x_scale, OptionalTensor x_extra,
    OptionalTensor y_scale, OptionalTensor y_extra, OptionalTensor gate, OptionalTensor decay,
    OptionalTensor cu_seqlens, OptionalTensor first_state, OptionalTensor first_sum,
    OptionalTensor permutations, OptionalTensor positions, int64_t offset, int64_t heads,
    bool phi_scores, bool causal, bool reverse, bool normalize, bool out_is_float,
    bool keep_state) {
  SweepParams p = make_params(x, y, w, heads, cu_seqlens);
  p.phi_scores = phi_scores, p.causal = causal, p.reverse = reverse;
  p.out_is_float = out_is_float || p.dtype == DType::f32;
  p.extra = x_extra.has_value() || y_extra.has_value();
  p.x_scale = numbers(p, x_scale, p.x.heads, "x_scale");
  p.x_extra = numbers(p, x_extra, p.x.heads, "x_extra");
  p.y_scale = numbers(p, y_scale, p.y.heads, "y_scale");
  p.y_extra = numbers(p, y_extra, p.y.heads, "y_extra");
  if (decay.has_value()) p.decay = floats(*decay, {heads}, "decay");
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  if (first_state.has_value()) {
    p.first_state = floats(*first_state, {sequences, heads, p.score_dim, p.value_dim}, "state");
    p.first_sum = floats(*first_sum, {sequences, heads, p.score_dim}, "sum");
  }
  const Tensor out = empty_rows(p, x, std::max(p.x.heads, heads), p.value_dim, out_is_float);
  p.out = view(out, p.cu_seqlens, "out");
  if (gate.has_value()) p.gate = view(*gate, p.cu_seqlens, "gate");
  const Tensor den = normalize ? empty_numbers(p, x, p.x.heads)
                               : torch::stable::new_empty(x, {0}, ScalarType::Float);
  if (normalize) p.den = static_cast<float*>(den.data_ptr());
  Tensor state = torch::stable::new_empty(x, {0}, ScalarType::Float), sum = state;
  if (keep_state) {
    state = torch::stable::new_empty(x, {sequences, heads, p.score_dim, p.value_dim},
                                     ScalarType::Float);
    sum = torch::stable::new_empty(x, {sequences, heads, p.score_dim}, ScalarType::Float);
    p.last_state = static_cast<float*>(state.data_ptr());
    p.last_sum = static_cast<float*>(sum.data_ptr());
  }
  if (!permutations.has_value()) {
    run(p);
  } else {
    run_permuted(p, permute::make_params(x, y, *permutations, positions, cu_seqlens), offset);
  }
  return {out, den, state, sum};
}

Tensor row_dots(Tensor x, Tensor y, bool packed) {
  SweepParams p{};
  p.dtype = dtype_of("linear_attn", x);
  p.x = view(x, packed, "x"), p.y = view(y, packed, "y");
  check_like(y, x, "y");
  set_sizes(p, x, packed);
  const Tensor out =
      packed ? torch::stable::new_empty(x, {p.x.heads, p.seqlen}, ScalarType::Float)
             : torch::stable::new_empty(x, {p.batch, p.x.heads, p.seqlen}, ScalarType::Float);
  float* data = static_cast<float*>(out.data_ptr());
  const SweepKernels kernel = kernels(p);
  torch::stable::parallel_for(0, p.batch * p.seqlen, kDotGrain, [&](int64_t begin, int64_t end) {
    kernel.dots(p, begin, end, data);
  });
  return out;
}

}  // namespace
}  // namespace sweep

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("linear_sweep", TORCH_BOX(&sweep::linear_sweep));
  m.impl("row_dots", TORCH_BOX(&sweep::row_dots));
}

}  // namespace extrope
