"""Attention on a CPU goes past the dispatcher: to the same kernels, unless somebody looks on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import direct_calls
import pytest
import torch
from direct_calls import Called, Dispatched, Own, assert_keeps_no_references, assert_same
from torch import Tensor

from extrope_kernels import (
    _ext,
    blockwise_causal_attention,
    dual_chunk_attention,
    methods,
    rerope_attention,
    scores,
    string_attention,
)
from extrope_kernels.ops._shared import direct
from extrope_kernels.ops.attention import block_call, block_forward

pytestmark = pytest.mark.skipif(_ext.load("cpu") is not None, reason="no CPU library")
FREQS = methods.yarn(32, factor=4.0, original_max_position_embeddings=64)


@dataclass
class Inputs:
    """q, k and v with 4 heads on 2 out of one packed projection, and a call."""

    tokens: tuple[int, ...] = (2, 17)
    dtype: torch.dtype = torch.float32
    head_dim_v: int = 32
    function: object = rerope_attention
    call: dict = field(default_factory=lambda: {"window": 8})

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)
        sizes = [4 * 32, 2 * 32, 2 * self.head_dim_v]
        packed = torch.randn(*self.tokens, sum(sizes), generator=generator).to(self.dtype)
        heads = zip(packed.split(sizes, -1), (4, 2, 2), strict=True)
        self.q, self.k, self.v = (x.unflatten(-1, (n, -1)) for x, n in heads)

    def run(self, **call) -> tuple[Tensor, ...]:
        call = {"freqs": FREQS, "return_lse": True, **self.call, **call}
        found = self.function(self.q, self.k, self.v, **call)
        return found if isinstance(found, tuple) else (found,)


CASES = {
    "rerope": Inputs(),
    "leaky_rerope, bfloat16": Inputs(dtype=torch.bfloat16, call={"window": 8, "factor": 4.0}),
    "dual_chunk, float16": Inputs(
        dtype=torch.float16,
        function=dual_chunk_attention,
        call={"chunk_size": 12, "local_window": 4},
    ),
    "blockwise_causal, XPOS": Inputs(
        function=blockwise_causal_attention,
        call={"block_size": 8, "freqs": methods.xpos(32)},
    ),
    "string": Inputs(function=string_attention, call={"shift": 8, "window": 4}),
    "packed": Inputs(
        (23,), call={"window": 8, "cu_seqlens": torch.tensor([0, 3, 3, 23], dtype=torch.int32)}
    ),
    "every option": Inputs(
        call={
            "window": 8,
            "sinks": torch.linspace(-1, 1, 4),
            "softcap": 2.0,
            "sliding_window": 11,
            "query_scale": torch.linspace(0.5, 1.5, 17),
            "log_n": 16,
            "softmax_scale": 0.3,
            "interleaved": True,
            "q_start": 3,
            "k_start": torch.tensor([0, 3], dtype=torch.int32),
        }
    ),
    "a wider v, frequencies of each": Inputs(
        head_dim_v=64,
        call={"window": 8, "freqs": methods.RopeFreqs(FREQS.inv_freq * torch.tensor([[1.0], [2]]))},
    ),
    "over threads": Inputs((2, 130)),
    "no tokens": Inputs((2, 0)),
}


@pytest.fixture
def calls(monkeypatch) -> list:
    return direct_calls.counted(monkeypatch, "attention")


@pytest.mark.parametrize("name", CASES)
def test_same_bits(monkeypatch, calls, name):
    inputs = CASES[name]
    got = inputs.run()
    assert calls == [True]
    assert_same(got, direct_calls.by_the_op(monkeypatch, inputs.run))
    assert calls == [True]


def test_without_lse(calls):
    inputs = Inputs()
    assert_same(inputs.run(return_lse=False), inputs.run()[:1])
    assert calls == [True, True]


@pytest.mark.parametrize("wanted", ("q", "k", "v", "sinks"))
def test_gradients_take_the_op(calls, wanted):
    inputs = Inputs(call={"window": 8, "sinks": torch.zeros(4)})
    leaf = (inputs.call[wanted] if wanted == "sinks" else getattr(inputs, wanted)).clone()
    leaf.requires_grad_()
    if wanted == "sinks":
        inputs.call["sinks"] = leaf
    else:
        setattr(inputs, wanted, leaf)
    sum(x.sum() for x in inputs.run()).backward()
    assert not calls and leaf.grad.count_nonzero() > 0
    with torch.no_grad():
        inputs.run()
    assert calls == [True]


def test_float32_results_take_the_op(calls):
    inputs = Inputs(dtype=torch.bfloat16)
    call = block_call("rerope_attention", scores.rerope(8), FREQS)
    tensors = inputs.q, inputs.k, inputs.v, FREQS.inv_freq
    wide = replace(call, options={**call.options, "float32_results": True})
    out, lse = block_forward(wide, *tensors)
    assert out.dtype == torch.float32 and not calls
    assert_same([out.bfloat16(), lse], block_forward(call, *tensors))
    assert calls == [True]


@pytest.mark.parametrize("mode", (Dispatched, Called))
def test_modes_see_the_op(calls, mode):
    inputs = Inputs()
    with mode() as looking_on:
        got = inputs.run()
    assert not calls and any("attention_fwd" in name for name in looking_on.seen)
    assert_same(got, inputs.run())


def test_profilers_see_the_op(calls):
    with torch.profiler.profile() as profile:
        Inputs().run()
    assert not calls
    assert "extrope::attention_fwd" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_negated_views(calls, name):
    """Whose memory holds the negated numbers."""
    inputs = Inputs()
    expected = inputs.run()
    calls.clear()
    setattr(inputs, name, torch._neg_view(-getattr(inputs, name)))
    assert_same(inputs.run(), expected)
    assert not calls


def test_other_tensors_and_large_results_take_the_op(monkeypatch, calls):
    inputs = Inputs()
    expected = inputs.run()
    calls.clear()
    inputs.v = inputs.v.as_subclass(Own)
    assert_same([x.as_subclass(Tensor) for x in inputs.run()], expected)
    inputs.v = inputs.v.as_subclass(Tensor)
    monkeypatch.setattr(direct, "LARGE", inputs.q.nbytes)
    assert_same(inputs.run(), expected)
    assert not calls


def test_batched_by_vmap(calls):
    inputs = Inputs()
    expected = inputs.run()
    calls.clear()
    got = torch.vmap(lambda *x: rerope_attention(*x, FREQS, window=8, return_lse=True))(
        inputs.q[:, None], inputs.k[:, None], inputs.v[:, None]
    )
    assert not calls
    assert_same([x.squeeze(1) for x in got], expected)


def test_forward_derivatives_are_refused(calls):
    inputs = Inputs()
    with torch.autograd.forward_ad.dual_level():
        inputs.q = torch.autograd.forward_ad.make_dual(inputs.q, torch.ones_like(inputs.q))
        with pytest.raises(NotImplementedError, match="has no forward-mode"):
            inputs.run()
    assert not calls


@pytest.mark.parametrize(
    "change, words",
    (
        ({"k": torch.zeros(2, 17, 3, 32)}, "v must have k.s shape"),
        ({"k": torch.zeros(2, 17, 2, 32, dtype=torch.bfloat16)}, "k must be torch.float32 on cpu"),
        ({"v": torch.zeros(2, 16, 2, 32)}, "v must have"),
        ({"v": torch.zeros(())}, "v must be"),
        ({"q": torch.zeros(17, 4, 32)}, "q must be"),
        ({"softmax_scale": -1.0}, "softmax_scale must be"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"sliding_window": 2**62}, "sliding_window must be"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "q must be"),
        ({"q_start": torch.tensor([-1], dtype=torch.int32)}, "q_start must be"),
    ),
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_refusals_are_the_ops(calls, change, words):
    inputs = Inputs()
    tensors = {name: change.get(name, getattr(inputs, name)) for name in "qkv"}
    vars(inputs).update(tensors)
    call = {name: x for name, x in change.items() if name not in tensors}
    with pytest.raises(ValueError, match=f"rerope_attention: .*{words}"):
        inputs.run(**call)
    assert True not in calls


def test_lets_go_of_pythons_lock(monkeypatch):
    long = Inputs((1, 1000))
    assert direct_calls.lets_go_of_pythons_lock(monkeypatch, "attention", long.run)


def test_keeps_no_references(calls):
    inputs, wrong = Inputs(), Inputs(call={"window": 8, "sinks": torch.zeros(3)})

    def both():
        inputs.run()
        with pytest.raises(ValueError, match="sinks must be"):
            wrong.run()
        calls.clear()

    watched = [inputs.q, inputs.k, inputs.v, FREQS.inv_freq, wrong.call["sinks"]]
    assert_keeps_no_references(watched, both)
