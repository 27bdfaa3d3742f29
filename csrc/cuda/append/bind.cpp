// The op of the CUDA kernel of `rope_append`, which starts it on torch's current stream.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/append_bind.h"
#include "common/ops.h"
#include "common/outputs.h"
#include "common/rope_norm_args.h"
#include "cuda/append/kernel.h"
#include "cuda/rope/kernel.h"
#include "cuda/rope/norm_kernel.h"
#include "cuda/stream.h"

namespace extrope {
namespace append {
namespace {

const OptionalView kNone;

// The tokens alone, where nothing is rotated.
RopeParams unrotated(const Args& a, const KVCache& cache) {
  RopeParams p{};
  p.dtype = cache.dtype;
  p.batch = a.batch(), p.seqlen = a.seqlen(), p.head_dim = cache.head_dim;
  p.cu_seqlens = cache.cu_new, p.num_sequences = cache.cu_new ? cache.batch : 0;
  p.amplitude = 1.0, p.angle_heads = 1;
  return p;
}

void set_rotation(const Args& a, const Rotation& r, AppendParams& p) {
  const bool moved = !r.stored.empty();
  if (moved) p.map = map_of(r.stored.data());
  p.rotates_q = !moved && a.q.has_value();
  p.rotates_k = !(moved && p.map.is_constant() && p.map(0) == 0);  // else they are raw
  p.maps = moved;
  if (p.rotates_q) {
    p.rope = make_params(*a.q, a.k, *r.inv_freq, r.positions, r.options, /*adjoint=*/false);
  } else {
    p.rope = make_params(a.k, kNone, *r.inv_freq, r.positions, r.options, /*adjoint=*/false);
  }
  if (r.positions.has_value()) {
    const bool whole =
        p.rope.position_type == PositionType::i32 || p.rope.position_type == PositionType::i64;
    check(!p.rope.positions_are_offsets, "positions must have an entry a token, got shape ",
          shape_of(*r.positions));
    check(!moved || (whole && !p.rope.axes),
          "positions must be whole numbers of one axis for a score method");
    return;
  }
  check(a.cache_seqlens.has_value(), "positions or cache_seqlens must say where the tokens are");
  p.behind = true;
  p.rope.positions = p.cache.seqlens;
  p.rope.position_type = PositionType::i32;
  p.rope.positions_are_offsets = true;
  p.rope.position_batch = 1;
}

void set_rows(const Args& a, const OptionalView& out_q, AppendParams& p) {
  const KVCache& cache = p.cache;
  const auto into = [](RopeTensor& x, const Plane& to) {
    x.out = to.data, x.out_batch = to.block, x.out_seq = to.slot, x.out_head = to.head;
  };
  if (out_q) {
    set_input(p.q, *a.q, a.packed());
    set_output(p.q, *out_q, a.packed());
    p.q.decay_sign = 1.0;
  }
  set_input(p.k, a.k, a.packed());
  set_input(p.v, a.v, a.packed());
  into(p.k, cache.k), into(p.v, cache.v);
  p.k.decay_sign = -1.0;
  p.blocks = a.k_cache.size(0);
  if (!a.slot_mapping.has_value()) return;
  const TensorView& slots = slots_of(a);
  p.slots = slots.data_ptr();
  p.slots_are_i64 = slots.scalar_type() == ScalarType::Long;
  p.slot_batch = a.packed() ? 0 : slots.stride(0);
  p.slot_seq = slots.stride(slots.dim() - 1);
}

AppendParams make_append_params(const Args& a, const Rotation& r) {
  AppendParams p{};
  p.cache = cache_of(a);
  check(a.q.has_value() || !r.q_norm_weight.has_value(), "q_norm_weight needs a q");
  check(r.stored.empty() || r.stored.size() == kMapNumbers, "stored must be ", kMapNumbers,
        " numbers, got ", r.stored.size());
  check(r.norm_eps >= 0, "norm_eps must be >= 0, got ", r.norm_eps);
  check(std::max(p.cache.head_dim, p.cache.head_dim_v) <= kMaxNormedDim,
        "head_dim must be at most ", kMaxNormedDim, " on a GPU, got ", p.cache.head_dim, " and ",
        p.cache.head_dim_v);
  p.norm_eps = r.norm_eps;
  if (a.q.has_value()) p.q_norm = norm_of(r.q_norm_weight, *a.q, "q_norm_weight");
  p.k_norm = norm_of(r.k_norm_weight, a.k, "k_norm_weight");
  p.rope = unrotated(a, p.cache);
  if (r.inv_freq.has_value()) set_rotation(a, r, p);
  return p;
}

// One call.
class Append {
 public:
  Append(const Args& a, const Rotation& r) : a_(a), p_(make_append_params(a, r)) {}

  void run(const OptionalView& out_q) {
    const OnDevice device(kOp, a_.k.get_device());
    set_rows(a_, out_q, p_);
    if (p_.rope.batch * p_.rope.seqlen == 0) return;
    const int error = rope_append_launch(p_, device.stream);
    check(error == 0, "CUDA error ", error, ": ", rope_error(error));
  }

 private:
  const Args& a_;
  AppendParams p_;
};

}  // namespace

const Ops append_ops{
    {"rope_append", TORCH_BOX(&(rope_append<Append, new_like>))},
};

}  // namespace append

}  // namespace extrope
