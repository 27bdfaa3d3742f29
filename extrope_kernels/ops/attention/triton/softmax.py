"""Device functions: all of a softmax beside its loops over keys, so caps and sinks too.

Kernels know logits of base 2 as a factor times what `bounded` makes of products of q and k: of a
capped logit the hyperbolic tangent, and else the product itself.
"""

import triton
import triton.language as tl

from ..._shared.triton.softmax import add_sink, tanh

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def factors_of(softmax_scale, softcap, TILE: tl.constexpr):
    """The factors of products before they are bounded, and of what is bounded."""
    inner = softmax_scale
    factor = softmax_scale * LOG2_E
    if TILE.capped:
        inner = softmax_scale / softcap
        factor = softcap * LOG2_E
    return inner, factor


@triton.jit
def bounded(products, inner, TILE: tl.constexpr):
    return tanh(products * inner) if TILE.capped else products


@triton.jit
def before_the_cap(d_logits, logits, TILE: tl.constexpr):
    """Gradients of logits as they were before the cap, from these and from what is bounded."""
    return d_logits * (1.0 - logits * logits) if TILE.capped else d_logits


@triton.jit
def finished(row_max, row_sum, sinks, head):
    """(factor of weighted values, what `lse_of` takes) at the end of rows, with their sink."""
    empty = row_sum == 0.0
    if sinks is None:
        row_sum = tl.where(empty, 1.0, row_sum)
        factor = 1.0 / row_sum
        alone = float("-inf")
    else:
        alone = tl.load(sinks + head)
        row_max, row_sum, rescale = add_sink(row_max, row_sum, alone * LOG2_E)
        # Of rows without keys, where the sink is -inf.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        factor = rescale / row_sum
    return factor, (row_max, row_sum, empty, alone)


@triton.jit
def lse_of(rows):
    """A row without keys has the sink's own bits."""
    row_max, row_sum, empty, alone = rows
    return tl.where(empty, alone, row_max * LN_2 + tl.log(row_sum))
