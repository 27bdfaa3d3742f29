"""What the Triton kernels over a cache rest on: angles at any position, splits, no lengths read."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from decode_oracle import Case, check, make  # noqa: E402

from extrope_kernels import methods, scores  # noqa: E402
from extrope_kernels.ops._shared.attention_call import AttentionCall, score_options  # noqa: E402
from extrope_kernels.ops._shared.triton.angles import cos_sin, fixed_angle  # noqa: E402
from extrope_kernels.ops.decode import reference  # noqa: E402
from extrope_kernels.ops.decode.arguments import KVCache  # noqa: E402
from extrope_kernels.ops.decode.triton import launch  # noqa: E402
from extrope_kernels.testing import assert_within_budget, device  # noqa: E402


@triton.jit
def _angles(inv_freq, positions, cos_out, sin_out, scale: tl.float64, N: tl.constexpr):
    n = tl.arange(0, N)
    angle = tl.load(positions + n)[:, None] * fixed_angle(tl.load(inv_freq + n), scale)[None]
    cos, sin = cos_sin(angle)
    place = n[:, None] * N + n[None, :]
    tl.store(cos_out + place, cos)
    tl.store(sin_out + place, sin)


@pytest.mark.parametrize("scale", (1.0, 0.25, 1 / 3, 16.0))
@pytest.mark.parametrize("largest", (10, 1_000, 1_000_000, 2**30))
def test_angles_are_as_exact_far_out_as_near(largest, scale):
    n = 64
    inv_freq = methods.rope(2 * n).inv_freq.to(device())
    positions = torch.randint(0, largest, (n,), device=device())
    cos, sin = (torch.empty(n, n, device=device()) for _ in range(2))
    _angles[(1,)](inv_freq, positions, cos, sin, scale, N=n)
    angle = positions[:, None].double() * (inv_freq.double() * scale)
    # float64 itself is this far off at 2**30 radians.
    bound = 1.5e-7 + 2.0**-52 * largest * scale
    assert (cos.double() - angle.cos()).abs().max() < bound
    assert (sin.double() - angle.sin()).abs().max() < bound


@pytest.mark.parametrize("frequency", (math.pi, 3.2, 7.0, 100.0))
def test_frequencies_past_half_a_turn(frequency):
    inv_freq = torch.full((16,), frequency, device=device())
    positions = torch.arange(16, device=device())
    cos, sin = (torch.empty(16, 16, device=device()) for _ in range(2))
    _angles[(1,)](inv_freq, positions, cos, sin, 1.0, N=16)
    angle = positions[:, None].double() * inv_freq.double()
    assert (cos.double() - angle.cos()).abs().max() < 2e-7
    assert (sin.double() - angle.sin()).abs().max() < 2e-7


@pytest.mark.parametrize("splits", (1, 2, 7, 40))
@pytest.mark.parametrize("seqlen_q", (1, 5))
def test_any_number_of_splits(splits, seqlen_q, monkeypatch):
    monkeypatch.setattr(launch, "_splits", lambda *_: splits)
    check(Case((97, 3), seqlen_q, parameters={"window": 20}), "triton")


def test_splits_follow_the_capacity_alone():
    inputs = make(Case((200, 1)))
    counts = []

    def count(*args):
        counts.append(original(*args))
        return counts[-1]

    original = launch._splits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_splits", count)
        inputs.run("triton")
        inputs.call["cache_seqlens"] = torch.ones_like(inputs.call["cache_seqlens"])
        inputs.run("triton")
    assert counts[0] == counts[1] > 1


def call_of(score: scores.Score, head_dim: int, **options) -> AttentionCall:
    told = score_options(score, stored=True)
    return AttentionCall(methods.rope(head_dim).inv_freq.to(device()), **told, **options)


def test_lengths_past_the_cache_are_cut():
    """On a GPU nobody looks at lengths: too long ones must not be read or written past the end."""
    k = torch.randn(2, 20, 1, 16, device=device())
    buffer = torch.full((4, 20, 1, 16), torch.nan, device=device())
    buffer[1:3] = k
    cache = buffer[1:3]
    seqlens = torch.tensor([18, 25], dtype=torch.int32, device=device())
    call = call_of(scores.rerope(8), 16)
    kv = KVCache(cache, cache.clone(), seqlens)
    new = torch.zeros(2, 4, 1, 16, device=device())
    launch.append(new, new, kv, call)
    assert not cache[0, 18:].any() and torch.equal(cache[1], k[1])
    assert buffer[3].isnan().all()
    out, _ = launch.decode(k[:, :1], None, None, kv, call)
    assert out.isfinite().all()


SCORES = {
    "rope": scores.rerope(7, 1.0),
    "rerope": scores.rerope(7),
    "leaky": scores.rerope(7, 3.0),
    "self_extend": scores.self_extend(6, 3),
    "dual_chunk": scores.dual_chunk(14, 4),
    "blockwise_causal": scores.blockwise_causal(20),
    "string": scores.string(9, 3),
}


@pytest.mark.parametrize("decayed", (False, True), ids=("", "xpos"))
@pytest.mark.parametrize("seqlen_q", (1, 13))
@pytest.mark.parametrize("name", SCORES)
def test_every_score_method(name, seqlen_q, decayed):
    """With k and v written first, into padded sequences of several splits; one is not full."""
    decay = methods.xpos(32).log_decay.to(device()) if decayed else None
    call = call_of(SCORES[name], 32, log_decay=decay, log_n=5.0, interleaved=decayed)
    lengths = torch.tensor([133, 19, 8], dtype=torch.int32, device=device()) - seqlen_q
    lengths = lengths.clamp(min=2)
    pads = torch.tensor([0, 2, 1], dtype=torch.int32, device=device())
    caches = [torch.randn(3, 140, 1, 32, device=device()) for _ in range(2)]
    q = torch.randn(3, seqlen_q, 3, 32, device=device())
    new = [torch.randn(3, seqlen_q, 1, 32, device=device()) for _ in range(2)]
    ours, theirs, wide = (
        KVCache(*(x.to(dtype, copy=True) for x in caches), lengths, None, pads, seqlen_q)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    found = launch.decode(q, *new, ours, call)
    same = reference.decode(q, *new, theirs, call)
    exact = reference.decode(q.double(), *(x.double() for x in new), wide, call)
    found, same, exact = ((*x, y.k, y.v) for x, y in ((found, ours), (same, theirs), (exact, wide)))
    for label, got, near, ideal in zip(("out", "lse", "k", "v"), found, same, exact):
        assert torch.equal(got == -torch.inf, ideal == -torch.inf)
        got, near, ideal = (x.masked_fill(x == -torch.inf, 0.0) for x in (got, near, ideal))
        # log_n comes as float32, before and after: that is all that differs of lse's rounding.
        assert_within_budget(label, got, near, ideal)


def test_no_number_of_a_call_specialises():
    """What changes as a cache grows may not compile a kernel again, in the middle of serving."""
    from extrope_kernels.ops.decode.triton import kernels

    names = set(kernels.RUN_TIME_SCALARS)
    assert {"capacity", "page_size", "table_batch", "seqlen_q", "granularity"} <= names
    assert not {"capacity", "page_size", "table_batch"} & set(launch.Cache._fields)
