"""Frequencies of each head, and position maps of each pair of dims: against angles in float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.attention_oracle import by_formula, check_both, closed_form, make_qkv
from support.decode_oracle import Case, check
from support.score_examples import PLAIN, Example, of_pairs, other_frequencies
from torch import Tensor

from extrope_kernels import RopeFreqs, methods, rope_attention, scores
from extrope_kernels.scores import PositionMap, Score
from extrope_kernels.testing import assert_within_budget, device

PAIRS = 14  # of 32 dims: the last four pass through
WINDOW = 6
BASE = RopeFreqs(methods.rope(2 * PAIRS).inv_freq.to(device()))


def drawn(*shape, seed=0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stretched(factors: Tensor) -> Score:
    return other_frequencies(WINDOW, factors)


def example(name: str) -> Example:
    """A score with sizes or factors of each pair."""
    if name == "factors":
        factors = 0.5 + 8 * drawn(PAIRS, seed=1)
        return Example(
            stretched(factors), functools.partial(of_pairs, window=WINDOW, divisors=factors)
        )
    sizes = (1 + 5 * drawn(PAIRS)).round()
    score = scores.dpe(WINDOW, sizes)
    if name == "stored by another map":  # keys are stored by one map, and far keys seen by another
        score = Score("stored by another map", score.regions, stored=PositionMap())
    return Example(score, functools.partial(of_pairs, window=WINDOW, sizes=sizes))


def frequencies(heads: int = 1, sequences: int = 1) -> RopeFreqs:
    """Of each head, and of each sequence where there are several."""
    scale = 1 + drawn(1, heads, 1, seed=2).float()
    rows = 1 + 0.1 * torch.arange(sequences).view(-1, 1, 1)
    return replace(BASE, inv_freq=BASE.inv_freq / scale.to(device()) * rows.to(device()))


class Row(NamedTuple):
    example: Example
    freqs: RopeFreqs = BASE


MADE = {
    "groups": Row(example("groups")),
    "factors": Row(example("factors")),
    "stored by another map": Row(example("stored by another map")),
    "frequencies of heads": Row(PLAIN, frequencies(2)),
    "frequencies and factors": Row(example("factors"), frequencies(2)),
}
OPTIONS = {
    "the last queries": {"seqlen_q": 8, "interleaved": True},
    "a window": {"sliding_window": 9},
    "sinks": {"sinks": torch.tensor([3.0, -1.0, 0.5, -2.0], device=device())},
    "packed": {"cu_seqlens": torch.tensor([0, 3, 3, 19], dtype=torch.int32, device=device())},
}


def qkv(dtype=torch.float32, batch=2, seqlen_q=19, seqlen_k=19):
    return make_qkv(batch, seqlen_q, seqlen_k, heads_q=4, heads_k=2, head_dim=32, dtype=dtype)


@pytest.mark.parametrize("name", MADE)
def test_the_reference_in_float64(name):
    (made, freqs), tensors = MADE[name], qkv(torch.float64)
    out = rope_attention(*tensors, freqs, made.score, backend="reference")
    exact, _ = by_formula(closed_form, made, tensors, freqs, {})
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", MADE)
def test_outputs_and_gradients(name, dtype, any_backend):
    if any_backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter does not round to bfloat16")
    check_both(any_backend, MADE[name].example, qkv(dtype), MADE[name].freqs)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ("groups", "frequencies and factors"))
def test_options(name, option, any_backend):
    """With frequencies of each sequence."""
    made, options = MADE[name].example, dict(OPTIONS[option])
    freqs = frequencies(2 if "frequencies" in name else 1, 3 if option == "packed" else 2)
    tensors = qkv(seqlen_q=options.pop("seqlen_q", 19))
    if option == "packed":
        tensors = [x[0] for x in tensors]
    check_both(any_backend, made, tensors, freqs, **options)


# -------------------------------------------------------------------------------------------------
# With a cache

DIMS = {"rotary_dim": 2 * PAIRS, "freqs_per_sequence": True}
CACHES = {
    "one token": Case((17, 4), **DIMS),
    "padded pages": Case((150, 137), 3, page_size=16, leftpad=(3, 0), appended=True, **DIMS),
    "packed": Case((150, 137), counts=(3, 1), appended=True, dtype=torch.bfloat16, **DIMS),
    "fp8": Case((150, 137), 3, fp8=True, appended=True, **DIMS),
    "raw": Case((150, 137), 3, raw=True, appended=True, dtype=torch.float16, **DIMS),
    "chunk": Case((150, 137), 130, page_size=16, dtype=torch.bfloat16, **DIMS),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", MADE)
def test_decode(name, kind, any_backend):
    """What is read, and where new keys are written: by pair, and by head."""
    of_heads = MADE[name].freqs is not BASE
    check(replace(CACHES[kind], example=MADE[name].example, freqs_per_head=of_heads), any_backend)


# -------------------------------------------------------------------------------------------------
# Gradients of frequencies


@pytest.mark.parametrize("kind", ["batch", "packed", "no score"])
def test_gradients_of_frequencies(kind, any_backend):
    """By every backend as by autograd through the formula of the reference, in float64."""
    q, k, v = qkv(batch=1 if kind == "packed" else 2, seqlen_q=19)
    inv_freq = frequencies(2, 2).inv_freq.requires_grad_()
    options = {"rotary_offset": 4 if kind == "batch" else 0}
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 5, 19], dtype=torch.int32, device=q.device)
        q, k, v = q[0], k[0], v[0]
    dout = torch.randn_like(q)
    score = None if kind == "no score" else stretched(0.5 + 8 * drawn(PAIRS))

    def found(backend, dtype):
        tensors = (x.to(dtype) for x in (q, k, v))
        out = rope_attention(*tensors, RopeFreqs(inv_freq), score, backend=backend, **options)
        return torch.autograd.grad((out * dout.to(dtype)).sum(), inv_freq)[0]

    want, low = found("reference", torch.float64), found("reference", torch.float32)
    # Sums of some hundred terms that were rounded in float32, of which regions are differences.
    noise = 1e-5 * want.abs().max().item()
    got = found(any_backend, torch.float32)
    assert_within_budget("inv_freq", got, low, want.to(got.dtype).double(), noise=noise)


def losses(q, k, v):
    """A loss of frequencies by the fused kernels, and these."""
    score = stretched(0.5 + 8 * drawn(PAIRS))

    def loss(inv_freq):
        return rope_attention(q, k, v, RopeFreqs(inv_freq), score).square().sum()

    return loss, frequencies(2).inv_freq


def test_gradients_of_frequencies_within_torch_func():
    loss, inv_freq = losses(*qkv())
    given, want = torch.stack((inv_freq, inv_freq + 0.1)), []
    for x in given:
        leaf = x.clone().requires_grad_()
        want.append(torch.autograd.grad(loss(leaf), leaf)[0])
    torch.testing.assert_close(torch.func.grad(loss)(inv_freq), want[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(given)[0], want[0])


def test_gradients_of_frequencies_have_none_of_their_own():
    """They say so, in place of a zero."""
    loss, inv_freq = losses(*qkv())
    leaf = inv_freq.requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: the fused kernels have first"):
        torch.autograd.grad(first.square().sum(), leaf)


@pytest.mark.thorough
def test_frequencies_are_learned_in_a_graph():
    loss, inv_freq = losses(*qkv())
    leaf = inv_freq.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    whole = torch.compile(backend="eager", fullgraph=True)  # of a backward alone
    with torch._dynamo.compiled_autograd._enable(whole):
        loss(leaf).backward()
    torch.testing.assert_close(leaf.grad, want)
