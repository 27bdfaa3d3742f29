// Registers the CPU kernels of `decode` and `append`.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/decode/call.h"

namespace extrope {
namespace decode {
namespace {

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
  Decode call({q, k_cache, v_cache, k, v, inv_freq, cache_seqlens, block_table, cache_leftpad,
               log_decay, sinks, query_scale, cu_seqlens_q, k_scale, v_scale},
              {std::move(starts), granularity, std::move(maps), softmax_scale, log_n,
               attention_factor, interleaved, softcap, sliding_window});
  const Tensor out = fresh(call.out_shape(), q.scalar_type());
  const Tensor lse = fresh(call.lse_shape(), ScalarType::Float);
  call.run(out.data_ptr(), static_cast<float*>(lse.data_ptr()));
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
