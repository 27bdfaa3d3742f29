// The op `rope_append` as it is registered: from its schema's arguments to where tokens go and what
// they are rotated by, for the CPU and the CUDA library alike.
#pragma once

#include <utility>
#include <vector>

#include "common/append_args.h"
#include "common/outputs.h"

namespace extrope::append {

constexpr int kTensors = 18;  // of the schema

// What rotates and scales q and k.
struct Rotation {
  OptionalView inv_freq, positions, q_norm_weight, k_norm_weight;
  RopeOptions options;
  std::vector<double> stored;  // the map that a score method stores keys by, or nothing
  double norm_eps;
};

// A call by the tensors of the schema, in its order: first q, k, v and the caches.
struct Call {
  Args args;
  Rotation rotation;

  Call(const OptionalView (&x)[kTensors], std::vector<double> stored, double norm_eps,
       double attention_factor, bool interleaved, double decay_origin)
      : args{x[0], x[1].value(), x[2].value(), x[3].value(), x[4].value(), x[8],
             x[9], x[10],        x[11],        x[12],        x[16],        x[17]},
        rotation{x[7],
                 x[13],
                 x[5],
                 x[6],
                 {x[11], x[14], x[15], attention_factor, 0, interleaved, /*inverse=*/false,
                  decay_origin, args.packed()},
                 std::move(stored),
                 norm_eps} {}
};

// Append(call) checks a call; its run(out_q) writes q, if there is one, and the cache.
template <typename Append, Tensor (*make_like)(const Tensor&)>
Tensor rope_append(const OptionalTensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                   const Tensor& v_cache, const OptionalTensor& q_norm_weight,
                   const OptionalTensor& k_norm_weight, const OptionalTensor& inv_freq,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& block_table,
                   const OptionalTensor& slot_mapping, const OptionalTensor& cu_seqlens,
                   const OptionalTensor& cache_leftpad, const OptionalTensor& positions,
                   const OptionalTensor& log_decay, const OptionalTensor& axes,
                   const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                   std::vector<double> stored, double norm_eps, double attention_factor,
                   bool interleaved, double decay_origin) {
  const Call call({q, k, v, k_cache, v_cache, q_norm_weight, k_norm_weight, inv_freq, cache_seqlens,
                   block_table, slot_mapping, cu_seqlens, cache_leftpad, positions, log_decay, axes,
                   k_scale, v_scale},
                  std::move(stored), norm_eps, attention_factor, interleaved, decay_origin);
  Append append(call.args, call.rotation);
  Tensor out = q.has_value() ? make_like(*q) : no_tensor(k, dtype_code(k));
  append.run(q.has_value() ? OptionalView(out) : OptionalView());
  return out;
}

}  // namespace extrope::append
