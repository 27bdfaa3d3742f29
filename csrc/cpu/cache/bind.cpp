// Registers the CPU kernel of `rope_append`.

#include <torch/csrc/stable/library.h>

#include <utility>
#include <vector>

#include "common/cache_args.h"
#include "common/map_args.h"
#include "common/ops.h"
#include "common/outputs.h"
#include "common/rope_args.h"
#include "cpu/cache/append.h"
#include "cpu/runtime/token.h"

namespace extrope {
namespace append {
namespace {

const OptionalTensor kNone;

// How q and k rotate.
struct AppendRotation {
  OptionalTensor inv_freq, positions;  // no inv_freq: not at all
  RopeOptions options;
  std::optional<PositionMap> stored;  // by which a score method stores keys
};

template <typename Int>
CacheRows rows_at(const CacheArgs& a, const KVCache& cache, const Int* slots) {
  const Tensor& x = *a.slot_mapping;
  const int64_t last = x.dim() - 1, all = a.k_cache.size(0) * cache.page_size;
  CacheRows rows(a.batch() * a.seqlen());
  for (int64_t b = 0, n = 0; b < a.batch(); ++b) {
    for (int64_t t = 0; t < a.seqlen(); ++t, ++n) {
      const int64_t slot = slots[(last > 0 ? b * x.stride(0) : 0) + t * x.stride(last)];
      a.require(-1 <= slot && slot < all, "slot_mapping must be -1 or one of the cache's ", all,
                " slots, got ", slot);
      if (slot >= 0) rows.set(cache, n, slot / cache.page_size, slot % cache.page_size);
    }
  }
  return rows;
}

CacheRows rows_of(const CacheArgs& a, const KVCache& cache) {
  if (!a.slot_mapping.has_value()) return rows_behind(cache, a.batch() * a.seqlen());
  const Tensor& x = *a.slot_mapping;
  a.require(x.get_device() == a.like.get_device() && x.dim() == a.like.dim() - 2 &&
                same_sizes(x, a.like, x.dim()),
            "slot_mapping must have k's tokens ", shape_of(a.like), ", on its device, got shape ",
            shape_of(x));
  if (x.scalar_type() == ScalarType::Int) {
    return rows_at(a, cache, static_cast<const int32_t*>(x.data_ptr()));
  }
  a.require(x.scalar_type() == ScalarType::Long, "slot_mapping must be int32 or int64");
  return rows_at(a, cache, static_cast<const int64_t*>(x.data_ptr()));
}

// A call: it rotates q and k, and writes k and v.
class RopeAppend {
 public:
  RopeAppend(const CacheArgs& a, const OptionalTensor& q, const AppendRotation& r)
      : a_(a),
        q_(q),
        r_(r),
        cache_(cache_of(a)),
        append_(cache_, rows_of(a, cache_), a.batch(), a.seqlen()) {
    const Tensor &k = *a.k, &v = *a.v;
    if (q) {
      a.require(r.inv_freq.has_value() && !r.stored, "q must be None where it does not rotate");
      check_rows(a.op, *q, a.packed(), "q");
      check_matching(a.op, *q, k, "q");
      refuse_overlap("q", *q);
    }
    refuse_overlap("k", k);
    refuse_overlap("v", v);
  }
  RopeAppend(const RopeAppend&) = delete;

  void run(const OptionalTensor& out_q) {
    if (r_.inv_freq.has_value()) {
      add_rotation(out_q);
    } else {
      const Tensor& k = a_.like;
      RopeParams keys =
          unrotated(cache_.dtype, plane(k), a_.batch(), a_.seqlen(), cache_.heads, cache_.head_dim);
      append_.write_keys(keys.tensors[0]);
      append_.add(keys);
    }
    append_.run(plane(*a_.v));
  }

 private:
  void refuse_overlap(const char* name, const Tensor& x) const {
    const int64_t d = x.dim();
    append_.refuse_overlap(a_.op, name, plane(x), x.size(d - 2), x.size(d - 1));
  }

  // Rotates q, if there is one, and k by the same angles in one rotation.
  void add_rotation(const OptionalTensor& out_q) {
    const Tensor& k = a_.like;
    RopeParams p = make_params(out_q ? *q_ : k, out_q ? OptionalTensor(k) : kNone, *r_.inv_freq,
                               r_.positions, r_.options, /*adjoint=*/false);
    if (out_q) set_output(p.tensors[0], *out_q, a_.packed());
    RopeTensor& keys = p.tensors[out_q ? 1 : 0];
    keys.decay_sign = -1.0;
    a_.require(!p.positions_are_offsets, "positions must have an entry a token");
    if (r_.stored || !r_.positions.has_value()) {
      std::vector<int64_t> at = positions_of(p);
      std::vector<double> places(at.begin(), at.end());
      for (double& place : places) {
        if (r_.stored) place = (*r_.stored)(static_cast<int64_t>(place));
      }
      append_.set_positions(p, std::move(places));
    }
    if (r_.positions.has_value()) check_positions(p);
    append_.write_keys(keys);
    append_.add(p);
  }

  // Returns the positions of all tokens: the call's, which are whole numbers, or those that follow
  // the slots in use.
  std::vector<int64_t> positions_of(const RopeParams& p) const {
    const int64_t tokens = a_.batch() * a_.seqlen();
    if (!r_.positions.has_value()) {
      a_.require(a_.cache_seqlens.has_value(),
                 "positions or cache_seqlens must say where the tokens are");
      return positions_behind(cache_, tokens);
    }
    a_.require(p.position_type == PositionType::i32 || p.position_type == PositionType::i64,
               "positions must be whole numbers for a score method");
    std::vector<int64_t> positions(tokens);
    for (int64_t n = 0; n < tokens; ++n) {
      positions[n] = locate<int64_t>(p, n / p.seqlen, n % p.seqlen).position;
    }
    return positions;
  }

  const CacheArgs& a_;
  const OptionalTensor& q_;
  const AppendRotation& r_;
  const KVCache cache_;
  Append append_;
};

EXTROPE_FUNCTION(Tensor, rope_append, const OptionalTensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& inv_freq,
                 const OptionalTensor& cache_seqlens, const OptionalTensor& block_table,
                 const OptionalTensor& slot_mapping, const OptionalTensor& positions,
                 const OptionalTensor& cu_seqlens, const OptionalTensor& cache_leftpad,
                 const OptionalTensor& log_decay, const OptionalTensor& k_scale,
                 const OptionalTensor& v_scale, const Column<int64_t>& map_kinds,
                 const Column<int64_t>& map_moduli, const Column<double>& map_divisors,
                 const Column<bool>& map_floors, const Column<double>& map_offsets,
                 const Column<double>& map_caps, double attention_factor, bool interleaved,
                 std::optional<int64_t> rotary_offset, double decay_origin) {
  const CacheArgs args{.op = "rope_append",
                       .name = "k",
                       .like = k,
                       .boundaries = "cu_seqlens",
                       .cu_seqlens = cu_seqlens,
                       .k_cache = k_cache,
                       .v_cache = v_cache,
                       .k = k,
                       .v = v,
                       .cache_seqlens = cache_seqlens,
                       .block_table = block_table,
                       .cache_leftpad = cache_leftpad,
                       .slot_mapping = slot_mapping,
                       .k_scale = k_scale,
                       .v_scale = v_scale,
                       .reads = false};
  AppendRotation rotation{.inv_freq = inv_freq,
                          .positions = positions,
                          .options = {.cu_seqlens = cu_seqlens,
                                      .log_decay = log_decay,
                                      .axes = {},
                                      .attention_factor = attention_factor,
                                      .offset = 0,
                                      .interleaved = interleaved,
                                      .rotary_offset = rotary_offset,
                                      .inverse = false,
                                      .decay_origin = decay_origin,
                                      .packed = args.packed()},
                          .stored = {}};
  if (map_kinds) {
    const Column<int64_t> no_rows;
    const MapColumns columns{*map_kinds,  map_moduli, map_divisors, map_floors,
                             map_offsets, map_caps,   no_rows};
    check_columns(args.op, columns, 1);
    rotation.stored = map_at(args.op, columns, 0);
    args.require(!rotation.stored->is_of_pairs(),
                 "map_kinds must be of a map that all pairs share, got ", (*map_kinds)[0]);
  }
  RopeAppend append(args, q, rotation);
  Tensor out = q.has_value() ? fresh_like(*q, args.op) : fresh(k, {0}, k.scalar_type(), args.op);
  append.run(q.has_value() ? OptionalTensor(out) : kNone);
  return out;
}

}  // namespace

const Ops ops{
    EXTROPE_OP("rope_append", rope_append),
};

}  // namespace append
}  // namespace extrope
