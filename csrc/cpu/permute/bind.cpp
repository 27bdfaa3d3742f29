// The op of the permutation, which splits its work over torch's threads. Python defines its schema
// (extrope_kernels/ops/permuteformer/op.py).

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/ops.h"
#include "common/outputs.h"
#include "cpu/permute/args.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/threads.h"

namespace extrope::permute {
namespace {

#define EXTROPE_KERNEL(isa) permute_tokens_##isa

EXTROPE_FUNCTION(TwoTensors, forward, const Tensor& q, const OptionalTensor& k,
                 const Tensor& permutations, const OptionalTensor& positions,
                 const OptionalTensor& cu_seqlens, int64_t offset, bool inverse) {
  PermuteParams p = make_params(q, k, permutations, positions, cu_seqlens);
  p.offset = offset, p.inverse = inverse;
  const std::tuple<Tensor, Tensor> outs = make_outputs("permute", p, q, k, cu_seqlens.has_value());
  if (p.batch * p.seqlen == 0) return outs;
  if (p.cu_seqlens) check_boundaries("permute", p, p.seqlen);
  const Decomposition decomposition(p);
  const int64_t heads = p.tensors[0].heads + p.tensors[1].heads;
  const PermuteTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  share_out(p.batch * p.seqlen, heads * p.head_dim * p.element_size,
            [&](int64_t begin, int64_t end) { tokens(p, decomposition.cycles(), begin, end); });
  return outs;
}

}  // namespace

const Ops ops{
    EXTROPE_OP("permute_fwd", forward),
};

}  // namespace extrope::permute
