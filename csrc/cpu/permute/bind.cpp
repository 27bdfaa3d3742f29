// Registers the CPU kernels of the permutation and splits their work over torch's threads.

#include <torch/csrc/stable/library.h>

#include "common/ops.h"
#include "common/permute_bind.h"
#include "cpu/permute/cycles.h"
#include "cpu/permute/kernel.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/threads.h"

namespace extrope::permute {
namespace {

#define EXTROPE_KERNEL(isa) permute_tokens_##isa

void launch(const PermuteParams& p, int /*device_index*/) {
  if (p.cu_seqlens) check_boundaries("permute", p);
  const Decomposition decomposition(p);
  const int64_t heads = p.tensors[0].heads + p.tensors[1].heads;
  const PermuteTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  share_out(p.batch * p.seqlen, heads * p.head_dim * p.element_size,
            [&](int64_t begin, int64_t end) { tokens(p, decomposition.cycles(), begin, end); });
}

using Permute = PermuteOps<launch>;

}  // namespace

const Ops ops{
    {"permute_fwd", TORCH_BOX(&Permute::forward)},
};

}  // namespace extrope::permute
