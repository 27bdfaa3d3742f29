// The op `rope_append` as it is registered: from its schema's arguments to where tokens go and what
// they are rotated by, for the CPU and the CUDA library alike.
#pragma once

#include <vector>

#include "common/append_args.h"

namespace extrope::append {

// What rotates and scales q and k.
struct Rotation {
  const OptionalTensor &inv_freq, &positions, &q_norm_weight, &k_norm_weight;
  RopeOptions options;
  const std::vector<double>& stored;  // the map that a score method stores keys by, or nothing
  double norm_eps;
};

template <Tensor (*run)(const Args&, const Rotation&)>
struct AppendOp {
  static Tensor rope_append(const OptionalTensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& k_cache, const Tensor& v_cache,
                            const OptionalTensor& q_norm_weight,
                            const OptionalTensor& k_norm_weight, const OptionalTensor& inv_freq,
                            const OptionalTensor& cache_seqlens, const OptionalTensor& block_table,
                            const OptionalTensor& slot_mapping, const OptionalTensor& cu_seqlens,
                            const OptionalTensor& cache_leftpad, const OptionalTensor& positions,
                            const OptionalTensor& log_decay, const OptionalTensor& axes,
                            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                            const std::vector<double>& stored, double norm_eps,
                            double attention_factor, bool interleaved, double decay_origin) {
    const Args a{q,           k,
                 v,           k_cache,
                 v_cache,     cache_seqlens,
                 block_table, slot_mapping,
                 cu_seqlens,  cache_leftpad,
                 k_scale,     v_scale};
    const Rotation r{inv_freq,
                     positions,
                     q_norm_weight,
                     k_norm_weight,
                     {cu_seqlens, log_decay, axes, attention_factor, 0, interleaved, false,
                      decay_origin, a.packed()},
                     stored,
                     norm_eps};
    return run(a, r);
  }
};

}  // namespace extrope::append
