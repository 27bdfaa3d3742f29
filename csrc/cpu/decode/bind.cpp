// Registers the CPU kernels of `decode` and `append`.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/ops.h"
#include "cpu/decode/args.h"
#include "cpu/decode/run.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"

namespace extrope {
namespace decode {
namespace {

#define EXTROPE_KERNELS(isa) \
  Kernels { decode_splits_##isa, merge_splits_##isa }

// A head_dim is a multiple of 8, and the kernels read rows in whole vectors.
Kernels kernels(const KVCache& cache) {
#if defined(__x86_64__)
  const bool halves = cache.head_dim % 16 != 0 || cache.head_dim_v % 16 != 0;
  if (capability() >= kAvx512 && halves) return EXTROPE_KERNELS(avx2);
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

const float* decay_of(const CacheArgs& a) {
  return a.log_decay.has_value() ? static_cast<const float*>(a.log_decay->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const Tensor& inv_freq, const Tensor& cache_seqlens,
    const OptionalTensor& block_table, const OptionalTensor& cache_leftpad,
    const OptionalTensor& log_decay, const OptionalTensor& sinks, const OptionalTensor& query_scale,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, std::vector<int64_t> starts, int64_t granularity,
    std::vector<double> maps, std::optional<double> softmax_scale, std::optional<double> log_n,
    double attention_factor, bool interleaved, double softcap,
    std::optional<int64_t> sliding_window) {
  constexpr const char* op = "decode";
  const CacheArgs args{.op = op,
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
                       .interleaved = interleaved,
                       .k_scale = k_scale,
                       .v_scale = v_scale};
  const bool packed = args.packed();
  DecodeParams p{};
  const TensorView queries = q;
  p.cache = cache_of(args, queries);
  set_queries(p, args, queries);
  const FrequencyRows freqs = frequencies_of(args, p.cache);
  p.freqs = freqs.params;
  p.regions = regions_of(op, starts, granularity, maps, sliding_window);
  check_decay(args, p.regions);
  p.softcap = softcap_of(op, softcap);
  p.softmax_scale = softmax_scale_of(op, softmax_scale, p.cache.head_dim);
  p.query_scale = query_scale_of(op, query_scale, p.cache.batch, p.seqlen_q, packed);
  p.sinks = sinks_of(op, sinks, p.heads_q);
  check_factors(op, log_n, attention_factor);
  p.log_n = log_n.value_or(0.0);
  p.amplitude = attention_factor * attention_factor;

  const Kernels run = kernels(p.cache);
  if (k.has_value()) {
    run_append(p.cache, p.freqs, decay_of(args), p.regions.stored, plane(*args.k), plane(*args.v));
  }
  std::vector<int64_t> out_shape{p.cache.batch, p.seqlen_q, p.heads_q, p.cache.head_dim_v};
  std::vector<int64_t> lse_shape{p.cache.batch, p.heads_q, p.seqlen_q};
  if (packed) out_shape.erase(out_shape.begin()), lse_shape.erase(lse_shape.begin());
  const Tensor out = fresh(out_shape, q.scalar_type()), lse = fresh(lse_shape, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  if (lse.numel() > 0) run_decode(p, run);
  return {out, lse};
}

void append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
            const Tensor& inv_freq, const Tensor& cache_seqlens, const OptionalTensor& block_table,
            const OptionalTensor& cache_leftpad, const OptionalTensor& log_decay,
            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
            const std::vector<double>& stored, bool interleaved) {
  constexpr const char* op = "append";
  const CacheArgs args{.op = op,
                       .k_cache = k_cache,
                       .v_cache = v_cache,
                       .k = k,
                       .v = v,
                       .inv_freq = inv_freq,
                       .cache_seqlens = cache_seqlens,
                       .block_table = block_table,
                       .cache_leftpad = cache_leftpad,
                       .log_decay = log_decay,
                       .cu_seqlens_q = {},
                       .interleaved = interleaved,
                       .k_scale = k_scale,
                       .v_scale = v_scale};
  const KVCache cache = cache_of(args, *args.k);
  require_of(op, stored.size() == kMapNumbers, "stored must be ", kMapNumbers, " numbers, got ",
             stored.size());
  const FrequencyRows freqs = frequencies_of(args, cache);
  run_append(cache, freqs.params, decay_of(args), map_of(stored.data()), plane(*args.k),
             plane(*args.v));
}

}  // namespace
}  // namespace decode

const Ops ops{
    {"decode", TORCH_BOX(&decode::decode)},
    {"append", TORCH_BOX(&decode::append)},
};

}  // namespace extrope
