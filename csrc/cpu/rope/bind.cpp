// Registers the CPU kernels of the rotation and splits their work over torch's threads.

#include <torch/csrc/stable/library.h>

#include "common/rope_bind.h"
#include "cpu/rope/kernel.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace {

#define EXTROPE_KERNEL(isa) rope_tokens_##isa

void check_axes(const RopeParams& p) {
  for (int64_t i = 0; i < p.rotary_dim / 2; ++i) {
    require(0 <= p.axes[i] && p.axes[i] < p.num_axes, "axes must be from 0 to ", p.num_axes - 1,
            " for positions of ", p.num_axes, " axes, got ", p.axes[i]);
  }
}

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void launch(const RopeParams& p, int /*device_index*/) {
  if (p.cu_seqlens) check_boundaries("rope", p);
  if (p.axes) check_axes(p);
  const RopeTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  const int64_t heads = p.tensors[0].heads + p.tensors[1].heads;
  share_out(p.batch * p.seqlen, heads * p.head_dim * element_size(p.dtype),
            [&](int64_t begin, int64_t end) { tokens(p, begin, end); });
}

using Ops = RopeOps<launch, fresh_like>;

int64_t cpu_capability() { return capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&Ops::fwd));
  m.impl("rope_bwd", TORCH_BOX(&Ops::bwd));
  m.impl("rope_inplace", TORCH_BOX(&Ops::inplace));
}

STABLE_TORCH_LIBRARY_IMPL(extrope, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_release_memory", TORCH_BOX(&release_kept_pages));
}

}  // namespace extrope
