// Registers the CPU kernel of `decode`.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/attention_args.h"
#include "common/cache_args.h"
#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/decode/run.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/pair_maps.h"

namespace extrope {
namespace decode {
namespace {

#define EXTROPE_KERNELS(isa) \
  DecodeKernels { decode_splits_##isa, merge_splits_##isa }

// Selects kernels: a head_dim is a multiple of 8, and kernels read rows in whole vectors.
DecodeKernels kernels(const KVCache& cache) {
#if defined(__x86_64__)
  const bool has_half_vectors = cache.head_dim % 16 != 0 || cache.head_dim_v % 16 != 0;
  if (capability() >= kAvx512 && has_half_vectors) return EXTROPE_KERNELS(avx2);
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

#undef EXTROPE_KERNELS

// Allocates results (batch, ...sizes); for packed queries they have no dimension of sequences.
Tensor result(const CacheArgs& a, std::vector<int64_t> sizes, ScalarType dtype) {
  if (a.packed()) sizes.erase(sizes.begin());
  return fresh(sizes, dtype, a.op);
}

void set_queries(DecodeParams& p, const CacheArgs& a, const Tensor& q) {
  const Plane rows = plane(q);
  p.q = rows.data, p.q_stride_batch = rows.block, p.q_stride_seq = rows.slot,
  p.q_stride_head = rows.head;
  p.seqlen_q = a.seqlen(), p.heads_q = q.size(q.dim() - 2);
  if (a.packed()) p.cu_seqlens_q = static_cast<const int32_t*>(a.cu_seqlens->data_ptr());
  a.require(p.cache.heads > 0 && p.heads_q % p.cache.heads == 0, "k_cache's heads must divide q's ",
            p.heads_q, " heads, got ", p.cache.heads);
}

DecodeParams make_params(const CacheArgs& a, const CallTensors& call,
                         const AttentionOptions& options) {
  DecodeParams p{};
  dtype_of(a.op, a.like);  // raises for float64
  p.cache = cache_of(a);
  check_head_dim(a.op, "head_dim", p.cache.head_dim);
  check_head_dim(a.op, "v_cache's head_dim", p.cache.head_dim_v);
  set_queries(p, a, a.like);
  p.regions = options.regions;
  p.regions.trim(p.cache.capacity);  // regions that no query of this cache reaches decide nothing
  for (int64_t r = 0; r < p.regions.count; ++r) {
    a.require(!call.log_decay.has_value() || p.regions.at[r].k_map == p.regions.stored,
              "log_decay (XPOS) needs keys that are stored as every region sees them");
  }
  static_cast<SoftmaxParams&>(p) =
      softmax_of(a.op, call, options, p.cache.batch, p.seqlen_q, p.heads_q, p.cache.head_dim);
  p.amplitude = options.attention_factor * options.attention_factor;
  return p;
}

// Holds the padded rows that `params` points to.
struct FrequencyRows {
  PaddedRows inv_freq, log_decay;
  Frequencies params;
};

FrequencyRows frequencies_of(const CacheArgs& a, const KVCache& cache, const CallTensors& call,
                             const AttentionOptions& options) {
  const auto& [inv_freq, log_decay] = std::tie(call.inv_freq, call.log_decay);
  check_frequencies(a.op, cache.head_dim, cache.batch, cache.heads, inv_freq, log_decay,
                    options.first_dim());
  FrequencyRows out{padded_rows(inv_freq), {}, {}};
  if (log_decay.has_value()) out.log_decay = padded_rows(*log_decay);
  const PaddedRows& rows = out.inv_freq;
  out.params = {.inv_freq = rows.values.data(),
                .log_decay = log_decay.has_value() ? out.log_decay.values.data() : nullptr,
                .half = rows.half,
                .padded = rows.padded,
                .batch = rows.rows > 1 ? rows.heads * rows.padded : 0,
                .interleaved = options.interleaved,
                .rotary_offset = options.first_dim(),
                .heads = rows.heads};
  return out;
}

EXTROPE_FUNCTION(TwoTensors, decode, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                 const OptionalTensor& k,
                 const OptionalTensor& v EXTROPE_CALL_TENSORS(EXTROPE_PARAMETER),
                 const Tensor& cache_seqlens, const OptionalTensor& block_table,
                 const OptionalTensor& cache_leftpad, const OptionalTensor& k_scale,
                 const OptionalTensor& v_scale EXTROPE_OPTIONS) {
  const AttentionOptions options = EXTROPE_READ_OPTIONS("decode");
  const CacheArgs args{.op = "decode",
                       .name = "q",
                       .like = q,
                       .boundaries = "cu_seqlens_q",
                       .cu_seqlens = cu_seqlens,
                       .k_cache = k_cache,
                       .v_cache = v_cache,
                       .k = k,
                       .v = v,
                       .cache_seqlens = cache_seqlens,
                       .block_table = block_table,
                       .cache_leftpad = cache_leftpad,
                       .slot_mapping = {},
                       .k_scale = k_scale,
                       .v_scale = v_scale,
                       .reads = true};
  const CallTensors call{EXTROPE_CALL_TENSORS(EXTROPE_VALUE)};
  DecodeParams p = make_params(args, call, options);
  const FrequencyRows freqs = frequencies_of(args, p.cache, call, options);
  p.freqs = freqs.params;
  const std::vector<double> maps_of_p =
      set_pair_maps(args.op, pair_maps, p.freqs.half, log_decay.has_value(), p.regions);
  const int64_t batch = p.cache.batch;
  const Tensor out =
      result(args, {batch, p.seqlen_q, p.heads_q, p.cache.head_dim_v}, q.scalar_type());
  const Tensor lse = result(args, {batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
  if (k.has_value()) {
    const auto* decay = log_decay.has_value() ? log_decay->data_ptr() : nullptr;
    run_append(p, static_cast<const float*>(decay), plane(*k), plane(*v));
  }
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  if (lse.numel() > 0) run_decode(p, kernels(p.cache));
  return {out, lse};
}

}  // namespace
}  // namespace decode

const Ops ops{EXTROPE_OP("decode", decode::decode)};

}  // namespace extrope
