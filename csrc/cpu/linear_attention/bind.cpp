// The ops of decayed linear attention. They check everything that could make a kernel read or write
// out of bounds; Python checks the rest (extrope_kernels/ops/permuteformer/checks.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "common/tensor_args.h"
#include "cpu/linear_attention/run.h"
#include "cpu/permute/args.h"
#include "cpu/runtime/capability.h"

namespace extrope {
namespace linear_attention {
namespace {

// -------------------------------------------------------------------------------------------------
// Arguments

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("linear_attn", condition, message...);
}

ScanTensor view(const Tensor& x, bool packed, const char* name) {
  check_rows("linear_attn", x, packed, name);
  require(x.is_cpu(), name, " must be on the CPU");
  const int64_t d = x.dim();
  return {x.data_ptr(), packed ? 0 : x.stride(0), x.stride(d - 3), x.stride(d - 2), x.size(d - 2)};
}

// Returns true if all dimensions except the last are equal.
bool same_rows(const Tensor& x, const Tensor& like) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = x.size(i) == like.size(i);
  return same;
}

void check_like(const Tensor& x, const Tensor& like, const char* name) {
  const int64_t last = like.dim() - 1;
  require(x.scalar_type() == like.scalar_type() && same_rows(x, like) &&
              x.size(last) == like.size(last),
          name, " must have the other's shape and dtype");
}

void set_sizes(ScanParams& p, const Tensor& q, bool packed) {
  const int64_t d = q.dim();
  p.batch = packed ? 1 : q.size(0);
  p.seqlen = q.size(d - 3);
  p.score_dim = q.size(d - 1);
}

ScanParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                       const OptionalTensor& cu_seqlens) {
  ScanParams p{};
  const bool packed = cu_seqlens.has_value();
  p.dtype = dtype_of("linear_attn", q);
  p.q = view(q, packed, "q"), p.k = view(k, packed, "k"), p.v = view(v, packed, "v");
  set_sizes(p, q, packed);
  p.value_dim = v.size(v.dim() - 1);
  p.heads = heads;
  for (const Tensor* other : {&k, &v}) {
    require(other->scalar_type() == q.scalar_type() && other->size(0) == q.size(0) &&
                (packed || other->size(1) == p.seqlen),
            "q, k and v must have the same dtype, batch and tokens");
  }
  require(k.size(k.dim() - 1) == p.score_dim, "q and k must have the same dim");
  require(p.v.heads == p.k.heads, "v must have the heads of k");
  for (const int64_t given : {p.q.heads, p.k.heads}) {
    require(given > 0 && heads > 0 && (given % heads == 0 || heads % given == 0),
            "heads of a tensor and of states must divide one another, got ", given, " and ", heads);
  }
  require(p.q.heads <= heads || p.k.heads <= heads, "q and k cannot both have groups of heads");
  if (packed) {
    set_cu_seqlens("linear_attn", p, *cu_seqlens, q);
    check_boundaries("linear_attn", p, p.seqlen);
  }
  return p;
}

float* floats(const Tensor& x, const std::vector<int64_t>& shape, const char* name) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == shape[i];
  require(fits && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.is_cpu(), name,
          " must be contiguous float32 of the right shape");
  return static_cast<float*>(x.data_ptr());
}

RowNumbers numbers(const ScanParams& p, const OptionalTensor& x, int64_t heads, const char* name) {
  if (!x.has_value()) return {nullptr, 1};
  std::vector<int64_t> shape{p.batch, heads, p.seqlen};
  if (p.cu_seqlens) shape.erase(shape.begin());
  return {floats(*x, shape, name), heads};
}

// -------------------------------------------------------------------------------------------------
// Ops

constexpr int64_t kDotGrain = 256;  // tokens

#define EXTROPE_KERNELS(isa) \
  ScanKernels { scan_plan_##isa, scan_chunk_##isa, scan_convert_##isa, scan_dots_##isa }

void run(const ScanParams& p) { ScanRun(p, EXTROPE_WIDEST(EXTROPE_KERNELS))(); }

Tensor empty_rows(const ScanParams& p, const Tensor& like, int64_t heads, int64_t dim, bool wide) {
  std::vector<int64_t> sizes{p.batch, p.seqlen, heads, dim};
  if (p.cu_seqlens) sizes.erase(sizes.begin());
  return torch::stable::new_empty(like, sizes, wide ? ScalarType::Float : like.scalar_type());
}

Tensor empty_numbers(const ScanParams& p, const Tensor& like, int64_t heads) {
  std::vector<int64_t> sizes{p.batch, heads, p.seqlen};
  if (p.cu_seqlens) sizes.erase(sizes.begin());
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// Runs a scan that permutes q and k by powers of permutations.
void run_permuted(ScanParams& p, PermuteParams permute, int64_t offset) {
  require(p.phi_scores, "only a scan whose scores have the feature map permutes");
  permute.offset = offset;
  const permute::Decomposition decomposition(permute);
  const PermuteCycles cycles = decomposition.cycles();
  p.permute = &permute, p.cycles = &cycles;
  run(p);
}

EXTROPE_FUNCTION(FourTensors, linear_scan, const Tensor& q, const Tensor& k, const Tensor& v,
                 const OptionalTensor& q_scale, const OptionalTensor& q_extra,
                 const OptionalTensor& k_scale, const OptionalTensor& k_extra,
                 const OptionalTensor& gate, const OptionalTensor& decay,
                 const OptionalTensor& cu_seqlens, const OptionalTensor& first_state,
                 const OptionalTensor& first_sum, const OptionalTensor& permutations,
                 const OptionalTensor& positions, int64_t offset, int64_t heads, bool phi_scores,
                 bool causal, bool reverse, bool normalize, bool out_is_float, bool keep_state) {
  ScanParams p = make_params(q, k, v, heads, cu_seqlens);
  p.phi_scores = phi_scores, p.causal = causal, p.reverse = reverse;
  p.out_is_float = out_is_float || p.dtype == DType::f32;
  p.extra = q_extra.has_value() || k_extra.has_value();
  p.q_scale = numbers(p, q_scale, p.q.heads, "q_scale");
  p.q_extra = numbers(p, q_extra, p.q.heads, "q_extra");
  p.k_scale = numbers(p, k_scale, p.k.heads, "k_scale");
  p.k_extra = numbers(p, k_extra, p.k.heads, "k_extra");
  if (decay.has_value()) p.decay = floats(*decay, {heads}, "decay");
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  require(first_state.has_value() == first_sum.has_value(), "state and sum come together");
  if (first_state.has_value()) {
    p.first_state = floats(*first_state, {sequences, heads, p.score_dim, p.value_dim}, "state");
    p.first_sum = floats(*first_sum, {sequences, heads, p.score_dim}, "sum");
  }
  const Tensor out = empty_rows(p, q, std::max(p.q.heads, heads), p.value_dim, out_is_float);
  p.out = view(out, p.cu_seqlens, "out");
  if (gate.has_value()) {
    p.gate = view(*gate, p.cu_seqlens, "gate");
    require(gate->scalar_type() == q.scalar_type() && same_rows(*gate, q) &&
                gate->size(gate->dim() - 1) == p.value_dim,
            "gate must have q's dtype and shape ", shape_of(q), ", but v's dim ", p.value_dim,
            ", got ", shape_of(*gate));
  }
  const Tensor den = normalize ? empty_numbers(p, q, p.q.heads)
                               : torch::stable::new_empty(q, {0}, ScalarType::Float);
  if (normalize) p.den = static_cast<float*>(den.data_ptr());
  Tensor state = torch::stable::new_empty(q, {0}, ScalarType::Float), sum = state;
  if (keep_state) {
    state = torch::stable::new_empty(q, {sequences, heads, p.score_dim, p.value_dim},
                                     ScalarType::Float);
    sum = torch::stable::new_empty(q, {sequences, heads, p.score_dim}, ScalarType::Float);
    p.last_state = static_cast<float*>(state.data_ptr());
    p.last_sum = static_cast<float*>(sum.data_ptr());
  }
  if (!permutations.has_value()) {
    run(p);
  } else {
    run_permuted(p, permute::make_params(q, k, *permutations, positions, cu_seqlens), offset);
  }
  return {out, den, state, sum};
}

EXTROPE_FUNCTION(Tensor, row_dots, const Tensor& q, const Tensor& k, bool packed) {
  ScanParams p{};
  p.dtype = dtype_of("linear_attn", q);
  p.q = view(q, packed, "q"), p.k = view(k, packed, "k");
  check_like(k, q, "k");
  set_sizes(p, q, packed);
  const Tensor out =
      packed ? torch::stable::new_empty(q, {p.q.heads, p.seqlen}, ScalarType::Float)
             : torch::stable::new_empty(q, {p.batch, p.q.heads, p.seqlen}, ScalarType::Float);
  float* data = static_cast<float*>(out.data_ptr());
  const ScanKernels kernel = EXTROPE_WIDEST(EXTROPE_KERNELS);
  torch::stable::parallel_for(0, p.batch * p.seqlen, kDotGrain, [&](int64_t begin, int64_t end) {
    kernel.dots(p, begin, end, data);
  });
  return out;
}

}  // namespace
}  // namespace linear_attention

const Ops ops{
    EXTROPE_OP("linear_scan", linear_attention::linear_scan),
    EXTROPE_OP("row_dots", linear_attention::row_dots),
};

}  // namespace extrope
