"""Small calls on a CPU go past the dispatcher: to the same kernels, unless somebody looks on."""

from __future__ import annotations

from dataclasses import replace

import direct_calls
import pytest
import torch
from append_cases import CONTIGUOUS, FILLER, Step, ints
from direct_calls import Called, Dispatched, Own, assert_keeps_no_references, assert_same

from extrope_kernels import _ext, methods, rope_append_kvcache, scores
from extrope_kernels.ops._shared import direct

pytestmark = pytest.mark.skipif(_ext.load("cpu") is not None, reason="no CPU library")
XPOS = methods.xpos(32)
SECTIONS = methods.with_sections(methods.rope(32), [4, 6, 6])
CASES = {
    "contiguous": Step(norms="head", call=CONTIGUOUS),
    "bfloat16, all heads": Step(dtype=torch.bfloat16, norms="all", call=CONTIGUOUS),
    "interleaved, another eps": Step(
        norms="head", rotary_dim=8, call={**CONTIGUOUS, "interleaved": True, "norm_eps": 0.5}
    ),
    "paged, left padding": Step(
        blocks=(12, 4),
        call={
            "cache_seqlens": ints(3, 9),
            "block_table": torch.randperm(12).int().view(2, 6),
            "cache_leftpad": ints(1, 0),
        },
    ),
    "packed, by slots": Step(
        blocks=(6, 4),
        tokens=(7,),
        call={"slot_mapping": ints(3, -1, 9, 2, 23, 0, -1), "positions": ints(5, 6, 7, 0, 1, 2, 3)},
    ),
    "over threads": Step(tokens=(2, 300), blocks=(2, 400), call=CONTIGUOUS),
    "packed": Step(tokens=(7,), call={**CONTIGUOUS, "cu_seqlens": ints(0, 3, 7)}),
    "XPOS": Step(call={**CONTIGUOUS, "freqs": replace(XPOS, decay_origin=7.0)}),
    "by axes": Step(
        call={**CONTIGUOUS, "freqs": SECTIONS, "positions": torch.arange(30).view(3, 2, 5)}
    ),
    "stored": Step(norms="head", call={**CONTIGUOUS, "score": scores.self_extend(8, 4)}),
    "raw": Step(call={**CONTIGUOUS, "score": scores.rerope(4)}),
}


@pytest.fixture
def calls(monkeypatch) -> list:
    return direct_calls.counted(monkeypatch, "rope_append")


def written(step: Step, **call) -> list[torch.Tensor | None]:
    """q, k_cache and v_cache."""
    caches = step.caches(step.dtype)
    call = {"freqs": step.freqs, **step.weights, **step.call, **call}
    return [rope_append_kvcache(step.q, step.k, step.v, *caches, **call), *caches]


def by_the_op(monkeypatch, step: Step) -> list[torch.Tensor | None]:
    return direct_calls.by_the_op(monkeypatch, lambda: written(step))


@pytest.mark.parametrize("name", CASES)
def test_same_bits(monkeypatch, calls, name):
    step = CASES[name]
    got = written(step)
    assert calls == [True]
    assert_same(got, by_the_op(monkeypatch, step))
    assert calls == [True]


def test_without_q(monkeypatch, calls):
    step = Step(norms="head", call=CONTIGUOUS)
    step.q = step.weights["q_norm_weight"] = None
    (none, *got), (_, *expected) = written(step), by_the_op(monkeypatch, step)
    assert none is None and calls == [True]
    assert_same(got, expected)


def test_e4m3(monkeypatch, calls):
    step = Step(call=CONTIGUOUS)
    scales = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([1.0, 0.25])}
    results = []
    for functions in (direct._functions, {}):
        monkeypatch.setattr(direct, "_functions", functions)
        caches = [x.to(torch.float8_e4m3fn) for x in step.caches(torch.float32)]
        q = rope_append_kvcache(step.q, step.k, step.v, *caches, step.freqs, **step.call, **scales)
        results.append([q, *(x.view(torch.uint8) for x in caches)])
    assert calls == [True]
    assert_same(*results)


@pytest.mark.parametrize("mode", (Dispatched, Called))
def test_modes_see_the_op(calls, mode):
    with mode() as looking_on:
        got = written(CASES["contiguous"])
    assert not calls and any("rope_append" in name for name in looking_on.seen)
    assert_same(got, written(CASES["contiguous"]))


def test_profilers_see_the_op(calls):
    with torch.profiler.profile() as profile:
        written(CASES["contiguous"])
    assert not calls
    assert "extrope::rope_append" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_traces_have_the_op(calls):
    step = CASES["contiguous"]
    caches = step.caches(step.dtype)

    def run(q, k, v):
        return rope_append_kvcache(q, k, v, *caches, step.freqs, **step.call)

    trace = torch.jit.trace(run, (step.q, step.k, step.v), check_trace=False)
    assert not calls and "extrope::rope_append" in str(trace.graph)


def test_forward_derivatives_are_refused(calls):
    step = CASES["contiguous"]
    with torch.autograd.forward_ad.dual_level():
        step = Step(call=CONTIGUOUS)
        step.q = torch.autograd.forward_ad.make_dual(step.q, torch.ones_like(step.q))
        with pytest.raises(NotImplementedError, match="rope_append: has no forward-mode"):
            written(step)
    assert not calls


@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_negated_views(calls, name):
    """Whose memory holds the negated numbers."""
    step = Step(norms="head", call=CONTIGUOUS)
    expected = written(step)
    setattr(step, name, torch._neg_view(-getattr(step, name)))
    calls.clear()
    assert_same(written(step), expected)
    assert not calls


def test_other_tensors_and_large_results_take_the_op(monkeypatch, calls):
    step = Step(norms="head", call=CONTIGUOUS)
    expected = written(step)
    calls.clear()
    step.q = step.q.as_subclass(Own)
    got = written(step)
    assert type(got[0]) is Own
    assert_same([x.as_subclass(torch.Tensor) for x in got], expected)
    monkeypatch.setattr(direct, "LARGE", step.q.nbytes)
    step.q = step.q.as_subclass(torch.Tensor)
    assert_same(written(step), expected)
    assert not calls
    step.q = step.weights["q_norm_weight"] = None
    assert_same(written(step)[1:], expected[1:])
    assert calls == [True]


@pytest.mark.parametrize(
    "change, words",
    (
        ({"k": torch.zeros(2, 5, 2, 32).to_sparse()}, "k must be a dense tensor"),
        ({"q": torch._efficientzerotensor((2, 5, 4, 32))}, "q must be contiguous"),
        ({"v": torch.zeros(2, 5, 2, 32, device="meta")}, "v must be torch.float32 on cpu"),
        ({"k": torch.zeros(2, 5, 2, 32, dtype=torch.int32)}, "k must be float32"),
        ({"v": torch.zeros(2, 5, 3, 32)}, "v must have k's tokens and heads"),
        ({"freqs": replace(methods.rope(32), attention_factor="1")}, "attention_factor"),
    ),
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_refusals_are_the_ops(calls, change, words):
    step = Step(call=CONTIGUOUS)
    vars(step).update(change)
    caches = step.caches(torch.float32)
    refused = pytest.raises((TypeError, ValueError), match=f"rope_append_kvcache: .*{words}")
    with torch.no_grad(), refused:
        rope_append_kvcache(step.q, step.k, step.v, *caches, step.freqs, **CONTIGUOUS)
    assert True not in calls
    assert all((x == FILLER).all() for x in caches)


def test_keeps_no_references(calls):
    step = Step(norms="head", call=CONTIGUOUS)
    wrong = Step(call={"cache_seqlens": ints(3, 99)})

    def both():
        written(step)
        with pytest.raises(ValueError, match="cache_seqlens must be between 0 and"):
            written(wrong)
        calls.clear()

    watched = [step.q, step.k, step.v, step.freqs.inv_freq, step.call["cache_seqlens"]]
    assert_keeps_no_references(watched, both)


def test_lets_go_of_pythons_lock(monkeypatch):
    step = Step(tokens=(2, 3000), blocks=(2, 3010), call=CONTIGUOUS)
    step.q, caches = None, step.caches(step.dtype)

    def append():
        rope_append_kvcache(None, step.k, step.v, *caches, step.freqs, **step.call)

    assert direct_calls.lets_go_of_pythons_lock(monkeypatch, "rope_append", append)


def test_without_dlpack(monkeypatch):
    """An interface of another major version is not called."""
    monkeypatch.setattr(direct, "_functions", {})
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
    direct._find_functions(None)
    assert direct._functions == {}
    written(CASES["contiguous"])
