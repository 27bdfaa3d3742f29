// Registers the CPU kernel of `rope_append`.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/append/args.h"
#include "cpu/append/writes.h"
#include "cpu/runtime/token.h"

namespace extrope {
namespace append {
namespace {

const OptionalTensor kNone;

// A call: it rotates q and k, and writes k and v.
class Append {
 public:
  Append(const Args& a, const Rotation& r)
      : a_(a),
        r_(r),
        cache_(checked_cache_of(a)),
        rows_(rows_of(a, cache_)),
        writes_(cache_, rows_, a.batch(), a.seqlen()) {
    check(a.q.has_value() || !r.q_norm_weight.has_value(), "q_norm_weight needs a q");
  }
  Append(const Append&) = delete;

  void run(const OptionalTensor& out_q) {
    if (r_.inv_freq.has_value() && !r_.stored) {
      add_together(out_q);
    } else {
      add_apart(out_q);
    }
    writes_.run(rotations_, plane(a_.v));
  }

 private:
  // Rotates q, if there is one, and k by the same angles in one rotation.
  void add_together(const OptionalTensor& out_q) {
    const OptionalTensor k = out_q ? OptionalTensor(a_.k) : kNone;
    const Tensor& first = out_q ? *a_.q : a_.k;
    RopeParams p = make_params(first, k, *r_.inv_freq, r_.positions, r_.options, /*adjoint=*/false);
    if (out_q) set_output(p.tensors[0], *out_q, a_.packed());
    RopeTensor& keys = p.tensors[out_q ? 1 : 0];
    keys.decay_sign = -1.0;
    set_positions(p);
    check_axes_of_pairs(p);
    writes_.take_keys(keys);
    rotations_.add(make_norm_params(p, first, k, out_q ? r_.q_norm_weight : r_.k_norm_weight,
                                    out_q ? r_.k_norm_weight : kNone, r_.norm_eps));
  }

  // Only norms q, if there is one; rotates k as a score method stores it, or only norms it.
  void add_apart(const OptionalTensor& out_q) {
    if (out_q) {
      RopeParams q = unrotated_part(*a_.q);
      set_output(q.tensors[0], *out_q, a_.packed());
      rotations_.add(make_norm_params(q, *a_.q, kNone, r_.q_norm_weight, kNone, r_.norm_eps));
    }
    RopeParams k = unrotated_part(a_.k);
    if (r_.inv_freq.has_value() && !is_raw(*r_.stored)) k = stored_keys(*r_.stored);
    writes_.take_keys(k.tensors[0]);
    rotations_.add(make_norm_params(k, a_.k, kNone, r_.k_norm_weight, kNone, r_.norm_eps));
  }

  RopeParams unrotated_part(const Tensor& x) const {
    const int64_t d = x.dim();
    return unrotated(cache_.dtype, plane(x), a_.batch(), a_.seqlen(), x.size(d - 2), x.size(d - 1));
  }

  RopeParams stored_keys(const PositionMap& stored) {
    RopeParams p = make_params(a_.k, kNone, *r_.inv_freq, r_.positions, r_.options,
                               /*adjoint=*/false);
    p.tensors[0].decay_sign = -1.0;
    set_positions(p);
    if (p.axes) {
      check(stored.kind == MapKind::kSame,
            "positions by axis must be where a score method stores keys, got a map of them");
      check_axes_of_pairs(p);
      return p;
    }
    if (token_positions_.empty()) {
      check(p.position_type == PositionType::i32 || p.position_type == PositionType::i64,
            "positions must be whole numbers for a score method");
      for (int64_t n = 0; n < p.batch * p.seqlen; ++n) {
        token_positions_.push_back(locate<int64_t>(p, n / p.seqlen, n % p.seqlen).position);
      }
    }
    stored_positions_ = mapped(stored, token_positions_);
    set_token_positions(p, stored_positions_);
    return p;
  }

  // Sets positions that follow the slots in use, unless the call has its own.
  void set_positions(RopeParams& p) {
    if (r_.positions.has_value()) {
      return check(!p.positions_are_offsets, "positions must have an entry a token, got shape ",
                   shape_of(*r_.positions));
    }
    check(a_.cache_seqlens.has_value(), "positions or cache_seqlens must say where the tokens are");
    token_positions_ = positions_behind(cache_, a_.batch() * a_.seqlen());
    set_token_positions(p, token_positions_);
  }

  const Args& a_;
  const Rotation& r_;
  const KVCache cache_;
  const CacheRows rows_;
  // Positions for the kernels instead of the tensor `positions`; empty if they read that.
  std::vector<int64_t> token_positions_;
  std::vector<double> stored_positions_;
  Rotations rotations_;
  CacheWrites writes_;
};

Tensor rope_append(const OptionalTensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                   const Tensor& v_cache, const OptionalTensor& q_norm_weight,
                   const OptionalTensor& k_norm_weight, const OptionalTensor& inv_freq,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& block_table,
                   const OptionalTensor& slot_mapping, const OptionalTensor& cu_seqlens,
                   const OptionalTensor& cache_leftpad, const OptionalTensor& positions,
                   const OptionalTensor& log_decay, const OptionalTensor& axes,
                   const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                   const Column<int64_t>& map_kinds, const Column<int64_t>& map_moduli,
                   const Column<double>& map_divisors, const Column<bool>& map_floors,
                   const Column<double>& map_offsets, const Column<double>& map_caps,
                   const Column<int64_t>& map_rows, double norm_eps, double attention_factor,
                   bool interleaved, double decay_origin) {
  const Args args{.q = q,
                  .k = k,
                  .v = v,
                  .k_cache = k_cache,
                  .v_cache = v_cache,
                  .cache_seqlens = cache_seqlens,
                  .block_table = block_table,
                  .slot_mapping = slot_mapping,
                  .cu_seqlens = cu_seqlens,
                  .cache_leftpad = cache_leftpad,
                  .k_scale = k_scale,
                  .v_scale = v_scale};
  Rotation rotation{.inv_freq = inv_freq,
                    .positions = positions,
                    .q_norm_weight = q_norm_weight,
                    .k_norm_weight = k_norm_weight,
                    .options = {cu_seqlens, log_decay, axes, attention_factor, 0, interleaved,
                                /*inverse=*/false, decay_origin, args.packed()},
                    .stored = {},
                    .norm_eps = norm_eps};
  if (map_kinds) {
    const MapColumns columns{*map_kinds,  map_moduli, map_divisors, map_floors,
                             map_offsets, map_caps,   map_rows};
    check_columns(kOp, columns, 1);
    rotation.stored = map_at(kOp, columns, 0);
  }
  Append append(args, rotation);
  Tensor out = q.has_value() ? fresh_like(*q, kOp) : fresh(k, {0}, k.scalar_type(), kOp);
  append.run(q.has_value() ? OptionalTensor(out) : kNone);
  return out;
}

}  // namespace

const Ops ops{
    {"rope_append", TORCH_BOX(&rope_append)},
};

}  // namespace append
}  // namespace extrope
