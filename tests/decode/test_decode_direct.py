"""Decode steps on a CPU go past the dispatcher: to the same kernels, unless somebody looks on."""

from __future__ import annotations

import threading
from dataclasses import replace

import direct_calls
import pytest
import torch
from decode_oracle import SCORES, Case, Inputs, make
from direct_calls import Called, Dispatched, Own, assert_keeps_no_references, assert_same

from extrope_kernels import _ext, scores
from extrope_kernels.ops._shared import direct
from extrope_kernels.ops.decode import attend_with_kvcache

pytestmark = pytest.mark.skipif(_ext.load("cpu") is not None, reason="no CPU library")
CASES = {
    **{name: Case((37, 1, 7), **score) for name, score in SCORES.items()},
    "several tokens, bfloat16": Case((37, 5, 0, 40), 5, dtype=torch.bfloat16),
    "pages, left padding": Case((70, 9), 2, page_size=21, leftpad=(3, 25), dtype=torch.float16),
    "every option": Case(
        (37, 70),
        sinks=True,
        softcap=2.0,
        sliding_window=29,
        query_scale=True,
        log_n=16,
        softmax_scale=0.3,
        interleaved=True,
        attention_factor=1.5,
    ),
    "a wider v, frequencies of each": Case((37, 9), head_dim_v=64, freqs_per_sequence=True),
    "e4m3": Case((37, 9), fp8=True, dtype=torch.bfloat16),
    "no sequence": Case(()),
}


@pytest.fixture
def calls(monkeypatch) -> list:
    return direct_calls.counted(monkeypatch, "decode")


def with_new_tokens(inputs: Inputs, packed: bool = False) -> Inputs:
    """A call that writes q's tokens behind those that are there."""
    generator = torch.Generator().manual_seed(1)
    shape = (*inputs.q.shape[:2], inputs.k_cache.shape[2])

    def new(cache):
        return torch.randn(*shape, cache.shape[-1], generator=generator).to(inputs.q.dtype)

    k, v = new(inputs.k_cache), new(inputs.v_cache)
    call = {**inputs.call, "k": k, "v": v}
    if not packed:
        return replace(inputs, call=call)
    batch, seqlen = inputs.q.shape[:2]
    call |= {"k": k.flatten(0, 1), "v": v.flatten(0, 1)}
    call["cu_seqlens_q"] = seqlen * torch.arange(batch + 1, dtype=torch.int32)
    return replace(inputs, q=inputs.q.flatten(0, 1), call=call)


def results(inputs: Inputs) -> list[torch.Tensor]:
    """out, lse and the caches behind a call, as bits where they hold NaN."""
    caches = [x.clone() for x in (inputs.k_cache, inputs.v_cache)]
    out, lse = replace(inputs, k_cache=caches[0], v_cache=caches[1]).run()
    return [out, lse, *(x.view(torch.uint8) for x in caches)]


@pytest.mark.parametrize("name", CASES)
def test_same_bits(monkeypatch, calls, name):
    inputs = make(CASES[name])
    got = results(inputs)
    assert calls == [True]
    assert_same(got, direct_calls.by_the_op(monkeypatch, lambda: results(inputs)))
    assert calls == [True]


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("name", ("rerope", "self_extend", "xpos"))
def test_new_tokens(monkeypatch, calls, name, packed):
    case = Case((20, 9), 2, page_size=7, **SCORES[name])
    case = replace(case, lengths=tuple(n + 4 for n in case.lengths))
    inputs = make(case)
    inputs.call["cache_seqlens"] -= 4
    inputs = with_new_tokens(inputs, packed)
    got = results(inputs)
    assert calls == [True]
    assert_same(got, direct_calls.by_the_op(monkeypatch, lambda: results(inputs)))


def attend(inputs: Inputs, **options) -> torch.Tensor:
    found = attend_with_kvcache(
        scores.rerope(8), inputs.q, inputs.k_cache, inputs.v_cache, inputs.freqs, **inputs.call,
        **options,
    )  # fmt: skip
    assert isinstance(found, torch.Tensor)
    return found


def test_without_lse(calls):
    inputs = make(Case((37, 9)))
    assert_same([attend(inputs)], results(inputs)[:1])
    assert calls == [True, True]


def test_out_takes_the_result(monkeypatch, calls):
    """Of a direct call, of the op, and where a direct call cannot write."""
    inputs = make(Case((37, 9)))
    expected = attend(inputs)
    calls.clear()
    out = torch.full_like(expected, torch.nan)
    assert attend(inputs, out=out) is out and calls == [True]
    assert_same([out], [expected])
    apart = torch.full((*expected.shape[:-1], 2 * expected.shape[-1]), torch.nan)[..., ::2]
    assert attend(inputs, out=apart) is apart and calls == [True, None]
    assert torch.equal(apart, expected)
    wide = torch.full_like(expected, torch.nan, dtype=torch.float64)
    assert attend(inputs, out=wide) is wide and calls == [True, None, None]
    assert torch.equal(wide, expected.double())
    out.fill_(torch.nan)
    direct_calls.by_the_op(monkeypatch, lambda: attend(inputs, out=out))
    assert_same([out], [expected])
    assert calls == [True, None, None]


@pytest.mark.parametrize("mode", (Dispatched, Called))
def test_modes_see_the_op(calls, mode):
    inputs = make(Case((37, 9)))
    with mode() as looking_on:
        got = inputs.run()
    assert not calls and any("decode" in name for name in looking_on.seen)
    assert_same(got, inputs.run())


def test_profilers_see_the_op(calls):
    inputs = make(Case((37, 9)))
    with torch.profiler.profile() as profile:
        inputs.run()
    assert not calls and "extrope::decode" in {event.key for event in profile.key_averages()}


def test_negated_views(calls):
    """Whose memory holds the negated numbers."""
    inputs = make(Case((37, 9)))
    expected = inputs.run()
    calls.clear()
    assert_same(replace(inputs, q=torch._neg_view(-inputs.q)).run(), expected)
    assert not calls


def test_other_tensors_and_large_results_take_the_op(monkeypatch, calls):
    inputs = make(Case((37, 9)))
    expected = inputs.run()
    calls.clear()
    got = replace(inputs, v_cache=inputs.v_cache.as_subclass(Own)).run()
    assert_same([x.as_subclass(torch.Tensor) for x in got], expected)
    monkeypatch.setattr(direct, "LARGE", inputs.q.nbytes)
    assert_same(inputs.run(), expected)
    assert not calls
    out = torch.empty_like(expected[0])
    assert attend(inputs, out=out) is out and calls == [True]


@pytest.mark.parametrize(
    "change, words",
    (
        ({"cache_seqlens": torch.tensor([9, 999], dtype=torch.int32)}, "cache_seqlens must be"),
        ({"cache_seqlens": torch.tensor([9.0, 3.0])}, "cache_seqlens must be int32"),
        ({"softmax_scale": -1.0}, "softmax_scale must be"),
        ({"softcap": 1e40}, "softcap must be"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"sliding_window": 2**62}, "sliding_window must be"),
        ({"k": torch.zeros(2, 1, 2, 32)}, "k and v must be given together"),
    ),
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_refusals_are_the_ops(calls, change, words):
    inputs = make(Case((37, 9)))
    inputs.call.update(change)
    with pytest.raises(ValueError, match=f"rerope_attention_with_kvcache: .*{words}"):
        inputs.run()
    assert True not in calls


def test_keeps_no_references(calls):
    inputs, wrong = make(Case((37, 9))), make(Case((37, 9)))
    wrong.call["cache_seqlens"] += 999

    def both():
        inputs.run()
        with pytest.raises(ValueError, match="cache_seqlens must be"):
            wrong.run()
        calls.clear()

    watched = [inputs.q, inputs.k_cache, inputs.freqs.inv_freq, inputs.call["cache_seqlens"]]
    assert_keeps_no_references(watched, both)


def test_threads_of_python(calls):
    """Their results are each thread's own."""
    long = make(Case((20_000,), parameters={"window": 10_000}))
    expected = long.run()
    found: list = [None] * 4

    def steps(n: int) -> None:
        found[n] = [long.run() for _ in range(20)]

    threads = [threading.Thread(target=steps, args=(n,)) for n in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in (got for each in found for got in each):
        assert_same(got, expected)
    assert calls == [True] * 81


def test_lets_go_of_pythons_lock(monkeypatch):
    long = make(Case((20_000,), parameters={"window": 10_000}))
    assert direct_calls.lets_go_of_pythons_lock(monkeypatch, "decode", long.run)
