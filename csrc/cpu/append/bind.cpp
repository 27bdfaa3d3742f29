// Registers the CPU kernel of `rope_append`.

#include <torch/csrc/stable/library.h>

#include <utility>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/append/append.h"
#include "cpu/append/args.h"
#include "cpu/runtime/token.h"

namespace extrope {
namespace append {
namespace {

const OptionalTensor kNone;

// A call: it rotates q and k, and writes k and v.
class RopeAppend {
 public:
  RopeAppend(const Args& a, const Rotation& r)
      : a_(a),
        r_(r),
        cache_(checked_cache_of(a)),
        append_(cache_, rows_of(a, cache_), a.batch(), a.seqlen()) {
    check(a.q.has_value() || !r.q_norm_weight.has_value(), "q_norm_weight needs a q");
    if (a.q) refuse_overlap("q", *a.q);
    refuse_overlap("k", a.k);
    refuse_overlap("v", a.v);
  }
  RopeAppend(const RopeAppend&) = delete;

  void run(const OptionalTensor& out_q) {
    if (r_.inv_freq.has_value() && !r_.stored) {
      add_together(out_q);
    } else {
      if (out_q) add_query_norm(*out_q);
      add_stored_keys();
    }
    append_.run(plane(a_.v));
  }

 private:
  void refuse_overlap(const char* name, const Tensor& x) const {
    const int64_t d = x.dim();
    append_.refuse_overlap(kOp, name, plane(x), x.size(d - 2), x.size(d - 1));
  }

  // Rotates q, if there is one, and k by the same angles in one rotation.
  void add_together(const OptionalTensor& out_q) {
    const OptionalTensor k = out_q ? OptionalTensor(a_.k) : kNone;
    const Tensor& first = out_q ? *a_.q : a_.k;
    RopeParams p = make_params(first, k, *r_.inv_freq, r_.positions, r_.options, /*adjoint=*/false);
    if (out_q) set_output(p.tensors[0], *out_q, a_.packed());
    RopeTensor& keys = p.tensors[out_q ? 1 : 0];
    keys.decay_sign = -1.0;
    check_positions(p);
    if (!r_.positions.has_value()) {
      const std::vector<int64_t> positions = positions_behind(cache_, a_.batch() * a_.seqlen());
      append_.set_positions(p, {positions.begin(), positions.end()});
    }
    check_axes_of_pairs(p);
    append_.write_keys(keys);
    append_.add(make_norm_params(p, first, k, out_q ? r_.q_norm_weight : r_.k_norm_weight,
                                 out_q ? r_.k_norm_weight : kNone, r_.norm_eps));
  }

  // Norms q, or copies it: the attention rotates it itself.
  void add_query_norm(const Tensor& out_q) {
    RopeParams q = unrotated_rows(*a_.q);
    set_output(q.tensors[0], out_q, a_.packed());
    append_.add(make_norm_params(q, *a_.q, kNone, r_.q_norm_weight, kNone, r_.norm_eps));
  }

  // Rotates k as a score method stores it, or only norms it.
  void add_stored_keys() {
    PositionMap stored = PositionMap::constant(0);
    if (r_.inv_freq.has_value()) stored = *r_.stored;
    if (is_raw(stored)) return append_.add_keys(key_norm(unrotated_rows(a_.k)), stored, {}, {});
    RopeParams p = make_params(a_.k, kNone, *r_.inv_freq, r_.positions, r_.options,
                               /*adjoint=*/false);
    p.tensors[0].decay_sign = -1.0;
    check_positions(p);
    if (!p.axes) return append_.add_keys(key_norm(p), stored, {}, positions_of(p));
    check(stored.kind == MapKind::kSame,
          "positions by axis must be where a score method stores keys, got a map of them");
    check_axes_of_pairs(p);
    append_.write_keys(p.tensors[0]);
    append_.add(key_norm(p));
  }

  RopeNormParams key_norm(const RopeParams& p) const {
    return make_norm_params(p, a_.k, kNone, r_.k_norm_weight, kNone, r_.norm_eps);
  }

  RopeParams unrotated_rows(const Tensor& x) const {
    const int64_t d = x.dim();
    return unrotated(cache_.dtype, plane(x), a_.batch(), a_.seqlen(), x.size(d - 2), x.size(d - 1));
  }

  void check_positions(const RopeParams& p) const {
    if (r_.positions.has_value()) {
      check(!p.positions_are_offsets, "positions must have an entry a token, got shape ",
            shape_of(*r_.positions));
    } else {
      check(a_.cache_seqlens.has_value(),
            "positions or cache_seqlens must say where the tokens are");
    }
  }

  // Returns the whole positions of all tokens: the call's, or those that follow the slots in use.
  std::vector<int64_t> positions_of(const RopeParams& p) const {
    const int64_t tokens = a_.batch() * a_.seqlen();
    if (!r_.positions.has_value()) return positions_behind(cache_, tokens);
    check(p.position_type == PositionType::i32 || p.position_type == PositionType::i64,
          "positions must be whole numbers for a score method");
    std::vector<int64_t> positions(tokens);
    for (int64_t n = 0; n < tokens; ++n) {
      positions[n] = locate<int64_t>(p, n / p.seqlen, n % p.seqlen).position;
    }
    return positions;
  }

  const Args& a_;
  const Rotation& r_;
  const KVCache cache_;
  Append append_;
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
                   bool interleaved, std::optional<int64_t> rotary_offset, double decay_origin) {
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
                    .options = {.cu_seqlens = cu_seqlens,
                                .log_decay = log_decay,
                                .axes = axes,
                                .attention_factor = attention_factor,
                                .offset = 0,
                                .interleaved = interleaved,
                                .rotary_offset = rotary_offset,
                                .inverse = false,
                                .decay_origin = decay_origin,
                                .packed = args.packed()},
                    .stored = {},
                    .norm_eps = norm_eps};
  if (map_kinds) {
    const MapColumns columns{*map_kinds,  map_moduli, map_divisors, map_floors,
                             map_offsets, map_caps,   map_rows};
    check_columns(kOp, columns, 1);
    rotation.stored = map_at(kOp, columns, 0);
    require_of(kOp, !rotation.stored->is_of_pairs(),
               "map_kinds must be of a map that all pairs share, got ", (*map_kinds)[0]);
  }
  RopeAppend append(args, rotation);
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
