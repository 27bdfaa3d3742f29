// Registers the CPU kernel of `decode`.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/decode/args.h"
#include "cpu/decode/run.h"
#include "cpu/runtime/capability.h"

namespace extrope {
namespace decode {
namespace {

#define EXTROPE_KERNELS(isa) \
  Kernels { decode_splits_##isa, merge_splits_##isa }

// Selects kernels: a head_dim is a multiple of 8, and kernels read rows in whole vectors.
Kernels kernels(const KVCache& cache) {
#if defined(__x86_64__)
  const bool halves = cache.head_dim % 16 != 0 || cache.head_dim_v % 16 != 0;
  if (capability() >= kAvx512 && halves) return EXTROPE_KERNELS(avx2);
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

#undef EXTROPE_KERNELS

// Allocates results (batch, ...sizes); for packed queries they have no dimension of sequences.
Tensor result(const CacheArgs& a, std::vector<int64_t> sizes, ScalarType dtype) {
  if (a.packed()) sizes.erase(sizes.begin());
  return fresh(sizes, dtype, a.op);
}

DecodeParams make_params(const CacheArgs& a, const Tensor& q, const OptionalTensor& sinks,
                         const OptionalTensor& query_scale, const AttentionOptions& options) {
  DecodeParams p{};
  p.cache = cache_of(a, q);
  set_queries(p, a, q);
  p.regions = options.regions;
  check_decay(a, p.regions);
  p.softcap = softcap_of(a.op, options.softcap);
  p.softmax_scale = softmax_scale_of(a.op, options.softmax_scale, p.cache.head_dim);
  p.sinks = sinks_of(a.op, sinks, p.heads_q);
  p.query_scale = query_scale_of(a.op, query_scale, p.cache.batch, p.seqlen_q, a.packed());
  check_attention_factor(a.op, options.attention_factor);
  p.amplitude = options.attention_factor * options.attention_factor;
  return p;
}

std::tuple<Tensor, Tensor> decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const Tensor& inv_freq, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& log_decay, const OptionalTensor& sinks, const OptionalTensor& query_scale,
    const OptionalTensor& pair_maps, const Tensor& cache_seqlens, const OptionalTensor& block_table,
    const OptionalTensor& cache_leftpad, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, EXTROPE_OPTIONS) {
  const AttentionOptions options = EXTROPE_READ_OPTIONS("decode");
  const CacheArgs args{.op = "decode",
                       .k_cache = k_cache,
                       .v_cache = v_cache,
                       .k = k,
                       .v = v,
                       .inv_freq = inv_freq,
                       .cache_seqlens = cache_seqlens,
                       .block_table = block_table,
                       .cache_leftpad = cache_leftpad,
                       .log_decay = log_decay,
                       .cu_seqlens_q = cu_seqlens_q,
                       .interleaved = options.interleaved,
                       .rotary_offset = options.rotary_offset,
                       .k_scale = k_scale,
                       .v_scale = v_scale};
  DecodeParams p = make_params(args, q, sinks, query_scale, options);
  const FrequencyRows freqs = frequencies_of(args, p.cache);
  p.freqs = freqs.params;
  const std::vector<double> maps_of_p =
      set_pair_maps(args.op, pair_maps, p.freqs.half, log_decay.has_value(), p.regions);
  const int64_t batch = p.cache.batch;
  const Tensor out =
      result(args, {batch, p.seqlen_q, p.heads_q, p.cache.head_dim_v}, q.scalar_type());
  const Tensor lse = result(args, {batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
  if (args.k.has_value()) {
    run_append(p.cache, p.freqs, decay_of(args), p.regions, plane(*args.k), plane(*args.v));
  }
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  if (lse.numel() > 0) run_decode(p, kernels(p.cache));
  return {out, lse};
}

}  // namespace
}  // namespace decode

const Ops ops{{"decode", TORCH_BOX(&decode::decode)}};

}  // namespace extrope
