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
  const CacheArgs args{op,
                       k_cache,
                       v_cache,
                       k,
                       v,
                       inv_freq,
                       cache_seqlens,
                       block_table,
                       cache_leftpad,
                       log_decay,
                       cu_seqlens_q,
                       interleaved,
                       k_scale,
                       v_scale};
  const bool packed = args.packed();
  DecodeParams p{};
  p.cache = cache_of(args, q);
  const Plane rows = plane(q);
  p.q = rows.data, p.q_batch = rows.block, p.q_seq = rows.slot, p.q_head = rows.head;
  p.seqlen_q = q.size(packed ? 0 : 1), p.heads_q = q.size(packed ? 1 : 2);
  if (packed) p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q->data_ptr());
  require_of(op, p.cache.heads > 0 && p.heads_q % p.cache.heads == 0,
             "k_cache's heads must divide q's ", p.heads_q, " heads, got ", p.cache.heads);
  const FrequencyRows freqs = frequencies_of(args, p.cache);
  p.freqs = freqs.params;
  p.regions = regions_of(op, starts, granularity, maps, sliding_window);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    require_of(op, !log_decay.has_value() || p.regions.at[r].k_map == p.regions.stored,
               "log_decay (XPOS) needs keys that are stored as every region sees them");
  }
  p.softcap = softcap_of(op, softcap);
  p.softmax_scale = softmax_scale_of(op, softmax_scale, p.cache.head_dim);
  p.query_scale = query_scale_of(op, query_scale, p.cache.batch, p.seqlen_q, packed);
  p.sinks = sinks_of(op, sinks, p.heads_q);
  check_scales(op, log_n, attention_factor);
  p.log_n = log_n.value_or(0.0);
  p.amplitude = attention_factor * attention_factor;

  const Kernels run = kernels(p.cache);
  if (k.has_value()) {
    run_append(p.cache, p.freqs, decay_of(args), p.regions.stored, plane(*k), plane(*v));
  }
  std::vector<int64_t> of_out{p.cache.batch, p.seqlen_q, p.heads_q, p.cache.head_dim_v};
  std::vector<int64_t> of_lse{p.cache.batch, p.heads_q, p.seqlen_q};
  if (packed) of_out.erase(of_out.begin()), of_lse.erase(of_lse.begin());
  const Tensor out = fresh(of_out, q.scalar_type()), lse = fresh(of_lse, ScalarType::Float);
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
  const OptionalTensor new_k = k, new_v = v, not_packed;
  const CacheArgs args{op,         k_cache,       v_cache,     new_k,         new_v,
                       inv_freq,   cache_seqlens, block_table, cache_leftpad, log_decay,
                       not_packed, interleaved,   k_scale,     v_scale};
  const KVCache cache = cache_of(args, k);
  require_of(op, stored.size() == kMapNumbers, "stored must be ", kMapNumbers, " numbers, got ",
             stored.size());
  const FrequencyRows freqs = frequencies_of(args, cache);
  run_append(cache, freqs.params, decay_of(args), map_of(stored.data()), plane(k), plane(v));
}

}  // namespace
}  // namespace decode

const Ops ops{
    {"decode", TORCH_BOX(&decode::decode)},
    {"append", TORCH_BOX(&decode::append)},
};

}  // namespace extrope
