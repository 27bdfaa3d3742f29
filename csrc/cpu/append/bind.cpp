// Registers the CPU kernel of `rope_append`.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/append_bind.h"
#include "common/ops.h"
#include "common/rope_norm_args.h"
#include "cpu/append/args.h"
#include "cpu/append/writes.h"
#include "cpu/rope/values.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/token.h"

namespace extrope {
namespace append {
namespace {

// Positions that the kernels read; empty where they read the tensor `positions`.
struct TokenPositions {
  std::vector<int64_t> behind;
  std::vector<double> stored;
};

void set_positions(const Args& a, const KVCache& cache, const Rotation& r, RopeParams& p,
                   TokenPositions& own) {
  if (r.positions.has_value()) {
    return check(!p.positions_are_offsets, "positions must have an entry a token, got shape ",
                 shape_of(*r.positions));
  }
  check(a.cache_seqlens.has_value(), "positions or cache_seqlens must say where the tokens are");
  own.behind = positions_behind(cache, a.batch() * a.seqlen());
  set_token_positions(p, own.behind);
}

// Where score methods store keys.
void move_to_stored(const PositionMap& stored, RopeParams& p, TokenPositions& own) {
  check(!p.axes, "positions by axis have no place in a score method");
  if (own.behind.empty()) {
    check(p.position_type == PositionType::i32 || p.position_type == PositionType::i64,
          "positions must be whole numbers for a score method");
    for (int64_t n = 0; n < p.batch * p.seqlen; ++n) {
      own.behind.push_back(locate<int64_t>(p, n / p.seqlen, n % p.seqlen).position);
    }
  }
  own.stored = mapped(stored, own.behind);
  set_token_positions(p, own.stored);
}

RopeParams part_of(const Tensor& x, const Args& a, const KVCache& cache) {
  const int64_t d = x.dim();
  return unrotated(cache.dtype, plane(x), a.batch(), a.seqlen(), x.size(d - 2), x.size(d - 1));
}

const OptionalTensor kNone;

// q, where it comes back changed or not, and k by itself.
void add_apart(const Args& a, const KVCache& cache, CacheWrites& writes, const Rotation& r,
               const Tensor* out_q, const PositionMap* stored, TokenPositions& own,
               Rotations& all) {
  if (out_q) {
    RopeParams q = part_of(*a.q, a, cache);
    set_output(q.tensors[0], *out_q, a.packed());
    all.add(make_norm_params(q, *a.q, kNone, r.q_norm_weight, kNone, r.norm_eps));
  }
  RopeParams k = part_of(a.k, a, cache);
  if (stored && !is_raw(*stored)) {
    k = make_params(a.k, kNone, *r.inv_freq, r.positions, r.options, /*adjoint=*/false);
    k.tensors[0].decay_sign = -1.0;
    set_positions(a, cache, r, k, own);
    move_to_stored(*stored, k, own);
  }
  writes.take_keys(k.tensors[0]);
  all.add(make_norm_params(k, a.k, kNone, r.k_norm_weight, kNone, r.norm_eps));
}

void add_together(const Args& a, const KVCache& cache, CacheWrites& writes, const Rotation& r,
                  const Tensor* out_q, TokenPositions& own, Rotations& all) {
  const OptionalTensor k = a.q.has_value() ? OptionalTensor(a.k) : kNone;
  const Tensor& first = a.q.has_value() ? *a.q : a.k;
  RopeParams p = make_params(first, k, *r.inv_freq, r.positions, r.options, /*adjoint=*/false);
  if (out_q) set_output(p.tensors[0], *out_q, a.packed());
  p.tensors[out_q ? 1 : 0].decay_sign = -1.0;
  set_positions(a, cache, r, p, own);
  check_axes_of_pairs(p);
  writes.take_keys(p.tensors[out_q ? 1 : 0]);
  all.add(make_norm_params(p, first, k, out_q ? r.q_norm_weight : r.k_norm_weight,
                           out_q ? r.k_norm_weight : kNone, r.norm_eps));
}

Tensor run(const Args& a, const Rotation& r) {
  const KVCache cache = checked_cache_of(a);
  const CacheRows rows = rows_of(a, cache);
  check(a.q.has_value() || !r.q_norm_weight.has_value(), "q_norm_weight needs a q");
  check(r.stored.empty() || r.stored.size() == kMapNumbers, "stored must be ", kMapNumbers,
        " numbers, got ", r.stored.size());
  Tensor out = a.q.has_value() ? fresh_like(*a.q) : no_tensor(a.k, dtype_code(a.k));
  const Tensor* out_q = a.q.has_value() ? &out : nullptr;
  TokenPositions own;
  Rotations all;
  CacheWrites writes(cache, rows, a.batch(), a.seqlen());
  if (r.inv_freq.has_value() && r.stored.empty()) {
    add_together(a, cache, writes, r, out_q, own, all);
  } else {
    const bool moved = r.inv_freq.has_value();
    const PositionMap map = moved ? map_of(r.stored.data()) : PositionMap{};
    add_apart(a, cache, writes, r, out_q, moved ? &map : nullptr, own, all);
  }
  writes.run(all, plane(a.v));
  return out;
}

}  // namespace
}  // namespace append

const Ops ops{
    {"rope_append", TORCH_BOX(&append::AppendOp<append::run>::rope_append)},
};

}  // namespace extrope
