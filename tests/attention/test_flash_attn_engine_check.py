"""The self-test of flash-attention engines: those that compute something else are not used."""

import pytest
import torch
from attention_engines import TorchEngine
from flash_attn_cases import CU_SEQLENS, ENGINES, assert_agrees, make

from extrope_kernels.ops.attention import flash_attn
from extrope_kernels.ops.attention.flash_attn import engine_check
from extrope_kernels.scores import FIRST_KEY


def broken(**changes):
    """A TorchEngine whose forward or backward functions are changed."""
    engine = TorchEngine(f"broken {sorted(changes)}", lse_unit=changes.pop("lse_unit", 1.0))
    for name, change in changes.items():
        setattr(engine, f"_{name}", change(getattr(engine, f"_{name}")))
    return engine


def own_delta(function):
    """A backward that forgets the out it is given."""

    def backward(dout, dlse, q, k, v, out, lse, scale, mask, softcap):
        own, _ = ENGINES["cuts"]._forward(q, k, v, scale, mask, softcap)
        return function(dout, dlse, q, k, v, own, lse, scale, mask, softcap)

    return backward


def own_lse(function):
    """A backward that forgets the lse it is given."""

    def backward(dout, dlse, q, k, v, out, lse, scale, mask, softcap):
        _, own = ENGINES["cuts"]._forward(q, k, v, scale, mask, softcap)
        return function(dout, dlse, q, k, v, out, own, scale, mask, softcap)

    return backward


def raises(error):
    def change(function):
        def call(*args):
            raise error

        return call

    return change


def unscaled(function):
    return lambda q, k, v, scale, *rest: function(q, k, v, 2 * scale, *rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lse_unit": 1.7}, "neither in base e nor in base 2"),
        ({"forward": unscaled}, "neither in base e nor in base 2"),
        ({"backward": own_delta}, "wrong dq"),
        ({"backward": own_lse}, "wrong dq"),
        ({"forward": lambda f: lambda *a: (f(*a)[0] * 1.1, f(*a)[1])}, "wrong out"),
        ({"backward": lambda f: lambda *a: (*f(*a)[:2], f(*a)[2] * 2)}, "wrong dv"),
        ({"forward": raises(TypeError("no argument 'left'"))}, "calls made here: no argument"),
        ({"backward": raises(RuntimeError("not built"))}, "calls made here: not built"),
        ({"forward": raises(Exception("no such tile"))}, "calls made here: no such tile"),
    ],
)
def test_an_engine_that_computes_something_else_is_refused(changes, message):
    q, k, v, call, *_ = make((FIRST_KEY, -2))
    with pytest.raises(NotImplementedError, match=f"flash_attn: broken .*{message}"):
        flash_attn.forward(q, k, v, call, broken(**changes))


def test_a_negative_right_bound_that_is_not_taken_is_not_used():
    """An engine that reads it as 0, as older packages would, gets its sequences cut instead."""

    class Clamps(TorchEngine):
        def forward(self, q, k, v, softmax_scale, left, right, cu_seqlens, softcap):
            return super().forward(q, k, v, softmax_scale, left, 0, cu_seqlens, softcap)

    engine = Clamps("clamps", negative_right=True)
    assert_agrees(engine, make((FIRST_KEY, -2), cu_seqlens=CU_SEQLENS), dlse=False)
    assert not engine_check.examine(engine, torch.empty(1, 1, 16).double()).negative_right


def test_the_self_test_runs_once():
    engine = TorchEngine("once")
    q, k, v, call, *_ = make((FIRST_KEY,))
    flash_attn.forward(q, k, v, call, engine)
    engine.calls.clear()
    flash_attn.forward(q, k, v, call, engine)
    assert engine.calls == [(None, 0)]
