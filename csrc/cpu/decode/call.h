// One call of `decode`: checked as it is made, then run once its results have memory.
#pragma once

#include <optional>
#include <vector>

#include "cpu/decode/args.h"
#include "cpu/decode/run.h"
#include "cpu/runtime/capability.h"

namespace extrope::decode {

#define EXTROPE_KERNELS(isa) \
  Kernels { decode_splits_##isa, merge_splits_##isa }

// A head_dim is a multiple of 8, and the kernels read rows in whole vectors.
inline Kernels kernels(const KVCache& cache) {
#if defined(__x86_64__)
  const bool halves = cache.head_dim % 16 != 0 || cache.head_dim_v % 16 != 0;
  if (capability() >= kAvx512 && halves) return EXTROPE_KERNELS(avx2);
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

#undef EXTROPE_KERNELS

constexpr int kTensors = 15;  // of the op's schema

// x: the tensors of the op's schema, in its order.
inline CacheArgs cache_args_of(const OptionalView (&x)[kTensors], bool interleaved) {
  return {.op = "decode",
          .k_cache = x[1].value(),
          .v_cache = x[2].value(),
          .k = x[3],
          .v = x[4],
          .inv_freq = x[5].value(),
          .cache_seqlens = x[6].value(),
          .block_table = x[7],
          .cache_leftpad = x[8],
          .log_decay = x[9],
          .cu_seqlens_q = x[12],
          .interleaved = interleaved,
          .k_scale = x[13],
          .v_scale = x[14]};
}

class Decode {
 public:
  Decode(const OptionalView (&x)[kTensors], const AttentionNumbers& n)
      : args_(cache_args_of(x, n.interleaved)) {
    const char* op = args_.op;
    const TensorView& q = x[0].value();
    p_.cache = cache_of(args_, q);
    set_queries(p_, args_, q);
    freqs_ = frequencies_of(args_, p_.cache);
    p_.freqs = freqs_.params;
    p_.regions = regions_of(op, n.starts, n.granularity, n.maps, n.sliding_window);
    check_decay(args_, p_.regions);
    p_.softcap = softcap_of(op, n.softcap);
    p_.softmax_scale = softmax_scale_of(op, n.softmax_scale, p_.cache.head_dim);
    p_.sinks = sinks_of(op, x[10], p_.heads_q);
    p_.query_scale = query_scale_of(op, x[11], p_.cache.batch, p_.seqlen_q, args_.packed());
    check_factors(op, n.log_n, n.attention_factor);
    p_.log_n = n.log_n.value_or(0.0);
    p_.amplitude = n.attention_factor * n.attention_factor;
  }
  Decode(const Decode&) = delete;

  std::vector<int64_t> out_shape() const {
    return shape({p_.cache.batch, p_.seqlen_q, p_.heads_q, p_.cache.head_dim_v});
  }
  // How many numbers lse has.
  int64_t rows() const { return (args_.packed() ? 1 : p_.cache.batch) * p_.seqlen_q * p_.heads_q; }
  std::vector<int64_t> lse_shape() const {
    return shape({p_.cache.batch, p_.heads_q, p_.seqlen_q});
  }

  // Whether out has room, without a look at its shape.
  bool fits(const TensorView& out) const {
    return out.numel() == rows() * p_.cache.head_dim_v && out.is_contiguous() && out.is_cpu() &&
           dtype_of(args_.op, out) == p_.cache.dtype;
  }

  // Writes the new tokens, and out and lse, which are contiguous.
  void run(void* out, float* lse) {
    if (args_.k.has_value()) {
      run_append(p_.cache, p_.freqs, decay_of(args_), p_.regions.stored, plane(*args_.k),
                 plane(*args_.v));
    }
    p_.out = out;
    p_.lse = lse;
    if (rows() > 0) run_decode(p_, kernels(p_.cache));
  }

 private:
  // Packed tensors have no dimension of sequences.
  std::vector<int64_t> shape(std::vector<int64_t> sizes) const {
    if (args_.packed()) sizes.erase(sizes.begin());
    return sizes;
  }

  const CacheArgs args_;
  DecodeParams p_{};
  FrequencyRows freqs_;
};

}  // namespace extrope::decode
