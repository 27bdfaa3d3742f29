// Registers the CPU kernels of the rotation and splits their work over torch's threads.

#include <torch/csrc/stable/library.h>

#include "common/rope_bind.h"
#include "cpu/rope/kernel.h"
#include "cpu/rope/values.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace {

#define EXTROPE_KERNEL(isa) rope_tokens_##isa

void launch(const RopeParams& p, int /*device_index*/) {
  check_values(p);
  const RopeTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  share_out(p.batch * p.seqlen, bytes_of_token(p),
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
