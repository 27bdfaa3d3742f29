"""Device functions: what a call asks of the softmax beside its logits, caps and sinks."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(8.0)  # past it tanh is 1, but for 2 units in the last place
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """Of float32, to 4 units in the last place however small x is; NaN of NaN.

    x P(x**2) / Q(x**2) with the least relative error up to _LARGEST.
    """
    x = tl.minimum(tl.maximum(x, -_LARGEST, propagate_nan=_ALL), _LARGEST, propagate_nan=_ALL)
    z = x * x
    above = 2.951034887171507e-3 + z * 1.142848571105796e-5
    above = 0.999999855560219 + z * (1.292567607640252e-1 + z * above)
    below = 2.3815607146169673e-2 + z * (2.386703906359719e-4 + z * 2.4592200945999215e-7)
    below = 1.0 + z * (4.625889210608028e-1 + z * below)
    return x * above / below


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap); both in the same units, natural or of base 2."""
    return softcap * tanh(logits * (1.0 / softcap))


@triton.jit
def sink_of(sinks, head, valid):
    """The sinks of these heads as logits of base 2: a row's, where it has one."""
    return tl.load(sinks + head, mask=valid, other=float("-inf")) * _LOG2_E


@triton.jit
def add_sink(row_max, row_sum, sink):
    """(row_max, row_sum, rescale) of rows that `sink` has joined, a logit without a value: weighted
    values are to be multiplied by rescale. All in base 2; row_max is finite where there is no key.
    """
    new_max = tl.maximum(row_max, sink)
    rescale = tl.exp2(row_max - new_max)
    # Not NaN where the sink is infinite, and takes all.
    weight = tl.where(sink == new_max, 1.0, tl.exp2(sink - new_max))
    return new_max, row_sum * rescale + weight, rescale
