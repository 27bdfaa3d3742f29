// Registers the CPU kernels of the merge and splits their work over torch's threads.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/merge/args.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/threads.h"

namespace extrope::merge {
namespace {

#define EXTROPE_KERNEL(isa) merge_tokens_##isa

void run(const MergeParams& p) {
  const MergeTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  const int64_t row = p.head_dim * (p.wide ? 8 : 4);
  share_out(p.batch * p.seqlen, p.heads * row * (p.num_sets + 1),
            [&](int64_t begin, int64_t end) { tokens(p, begin, end); });
}

std::tuple<Tensor, Tensor> merge_fwd(const std::vector<Tensor>& outs,
                                     const std::vector<Tensor>& lses) {
  Args args(outs, lses, /*in_place=*/false);
  const Tensor out = fresh_like(outs[0]);
  std::vector<int64_t> sizes(lses[0].dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = lses[0].size(i);
  const Tensor lse = fresh(sizes, lses[0].scalar_type());
  run(args.params(out, lse));
  return {out, lse};
}

void merge_inplace(const Tensor& out, const Tensor& lse, const std::vector<Tensor>& outs,
                   const std::vector<Tensor>& lses) {
  std::vector<Tensor> all_outs{out}, all_lses{lse};
  all_outs.insert(all_outs.end(), outs.begin(), outs.end());
  all_lses.insert(all_lses.end(), lses.begin(), lses.end());
  Args args(all_outs, all_lses, /*in_place=*/true);
  run(args.params(out, lse));
}

}  // namespace

const Ops ops{
    {"merge_fwd", TORCH_BOX(&merge_fwd)},
    {"merge_inplace", TORCH_BOX(&merge_inplace)},
};

}  // namespace extrope::merge
