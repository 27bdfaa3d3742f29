"""Attention whose positions have several axes (mRoPE): each pair of dims has its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_oracle import check_both
from score_examples import Example, Relative
from test_pair_maps import BASE, PAIRS, drawn, example, frequencies, qkv, stretched
from torch import Tensor

from extrope_kernels import rope_attention, scores
from extrope_kernels.scores import PairMap, PositionMap, Region, Score
from extrope_kernels.testing import assert_within_budget, device

AXES = torch.tensor([0, 1, 2, 0, 1] * 2 + [0] * 4, dtype=torch.int32)


SCORES = {
    "no score": None,
    "groups": example("groups").score,
    "factors": example("factors").score,
    "rerope": scores.rerope(6),
}


def by_axes(seqlen: int) -> Tensor:
    """Text, an image of 2 x 3 patches, and text again, as mRoPE counts them: (3, 2, seqlen)."""
    image = [[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]]
    rows = torch.tensor([[*range(4), *axis, *range(7, 7 + seqlen - 10)] for axis in image])
    return torch.stack((rows, rows + torch.tensor([[0], [1], [2]])), 1).to(device())


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_of_axes(name, dtype, any_backend):
    """Regions count tokens, and distances are those of the pair's own axis."""
    score = SCORES[name]
    places = by_axes(19)[AXES.long()].double().cpu().permute(1, 2, 0)  # (batch, seqlen, pairs)
    i, j = places[:, None, 6:, None], places[:, None, None]  # (batch, 1, rows, 1, pairs)
    tokens = (torch.arange(6, 19)[:, None] - torch.arange(19)[None]).double()
    seen = i - j
    if score is not None:
        far = score.regions[0]
        apart = 6.0 if name == "rerope" else _of_pair(far.q_map, i) - _of_pair(far.k_map, j)
        seen = torch.where((tokens < 6)[..., None], seen, apart)
    relative = Relative(tokens.masked_fill(tokens < 0, torch.nan), by_pair=seen)
    made = Example(score, lambda seqlen_q, seqlen_k: relative)
    tensors, freqs = qkv(dtype, seqlen_q=13, seqlen_k=19), replace(BASE, axes=AXES.to(device()))
    check_both(any_backend, made, tensors, freqs, False, positions=by_axes(19))


def test_gradients_of_divisors_with_axes(any_backend):
    """As the slope between two values in float64."""
    tensors = qkv(seqlen_q=13, seqlen_k=19)
    freqs = replace(BASE, axes=AXES.to(tensors[0].device))
    factors = (0.5 + 8 * drawn(PAIRS)).to(tensors[0].device)

    def loss(factors, dtype, backend):
        q, k, v = (x.to(dtype) for x in tensors)
        given = {"positions": by_axes(19), "backend": backend}
        return rope_attention(q, k, v, freqs, stretched(factors), **given).square().sum()

    def found(dtype, backend):
        leaf = factors.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, dtype, backend), leaf)[0]

    exact, step = found(torch.float64, "reference"), torch.zeros_like(factors)
    step[5] = 1e-6
    ends = [loss(factors + sign * step, torch.float64, "reference") for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, exact[5], rtol=1e-5, atol=1e-7)
    low = found(torch.float32, "reference")
    noise = 1e-5 * exact.abs().max().item()
    assert_within_budget("divisor", found(torch.float32, any_backend), low, exact, noise=noise)


def _of_pair(by: PairMap, positions: Tensor) -> Tensor:
    """Positions (..., pairs), each by its own pair's numbers."""
    p = positions / by.divisor
    return (p.floor() if by.floor else p) + by.offset


OPTIONS = {
    "window": {"sliding_window": 9},
    "log_n": {"log_n": 4},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "query_scale": {"query_scale": torch.linspace(0.5, 1.5, 13)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["no score", "groups"])
def test_axes_that_agree_are_one(name, option, any_backend):
    """With the token's own index on every axis all options are those of one axis, in float64."""
    dtype = torch.float64 if any_backend == "reference" else torch.float32
    q, k, v = qkv(dtype, seqlen_q=13, seqlen_k=19)
    freqs, score = BASE, SCORES[name]
    options = {key: x.to(q.device) if isinstance(x, Tensor) else x
               for key, x in OPTIONS[option].items()}  # fmt: skip
    if option == "sinks":
        options["sinks"] = options["sinks"].to(dtype)
    options |= {"backend": any_backend, "return_lse": True}
    want = rope_attention(q, k, v, freqs, score, **options)
    positions = torch.arange(19, device=q.device).expand(3, 1, 19)
    by_axis = replace(freqs, axes=AXES.to(q.device))
    found = rope_attention(q, k, v, by_axis, score, positions=positions, **options)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 3e-6}
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (0, 0), (1, 1)])
def test_axes_without_tokens(seqlen_q, seqlen_k, any_backend):
    """No query, no key, or one of each."""
    q, k, v = (x[:, :n] for x, n in zip(qkv(), (seqlen_q, seqlen_k, seqlen_k), strict=True))
    freqs = BASE
    options = {"backend": any_backend, "return_lse": True}
    want = rope_attention(q, k, v, freqs, scores.rerope(2), **options)
    positions = torch.arange(seqlen_k, device=q.device).expand(3, 1, seqlen_k)
    by_axis = replace(freqs, axes=AXES.to(q.device))
    found = rope_attention(q, k, v, by_axis, scores.rerope(2), positions=positions, **options)
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-6)


def test_axes_refuse_queries_without_positions():
    q, k, v = qkv(seqlen_k=12)
    freqs = replace(BASE, axes=AXES.to(q.device))
    with pytest.raises(
        ValueError, match=r"q must have at most k's 12 tokens with positions of .* got 19"
    ):
        rope_attention(q, k, v, freqs, positions=by_axes(12))


@pytest.mark.parametrize(
    ("axes", "positions", "message"),
    [
        (AXES, by_axes(19)[:2], "axes must be from 0 to 1 for positions of 2 axes"),
        (AXES - 1, by_axes(19), "axes must be from 0 to 2 .*, got .-1, 0"),
    ],
)
def test_axes_are_rows_of_positions(axes, positions, message):
    q, k, v = qkv()
    freqs = replace(BASE, axes=axes.to(q.device))
    with pytest.raises(ValueError, match=f"^rope_attention: {message}"):
        rope_attention(q, k, v, freqs, positions=positions)


def test_axes_refuse_frequencies_of_heads():
    q, k, v = qkv()
    freqs = replace(frequencies(2), axes=AXES.to(q.device))
    with pytest.raises(
        ValueError, match="rope_attention: frequencies and maps must be the same for all heads"
    ):
        rope_attention(q, k, v, freqs, positions=by_axes(19))


def test_axes_without_a_key_in_sight():
    freqs = replace(BASE, axes=AXES.to(device()))
    q, k, v = (torch.randn(1, 3, n, 32, device=device()) for n in (2, 1, 1))
    score = Score("none", (Region(1, PositionMap(), PositionMap()),))
    places = torch.zeros(int(AXES.max()) + 1, 1, 3, device=device())
    out, lse = rope_attention(q, k, v, freqs, score, positions=places, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
