"""What the Triton kernels over a cache rest on: angles at any position, splits, no lengths read."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from decode_oracle import Case, check, make  # noqa: E402

from extrope_kernels import methods  # noqa: E402
from extrope_kernels.ops.attention.triton import launch_decode  # noqa: E402
from extrope_kernels.ops.attention.triton.turns import cos_sin, fixed_turns  # noqa: E402
from extrope_kernels.testing import device  # noqa: E402


@triton.jit
def _angles(inv_freq, positions, cos_out, sin_out, scale: tl.float64, N: tl.constexpr):
    lane = tl.arange(0, N)
    turns = tl.load(positions + lane)[:, None] * fixed_turns(tl.load(inv_freq + lane), scale)[None]
    cos, sin = cos_sin(turns)
    place = lane[:, None] * N + lane[None, :]
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
    monkeypatch.setattr(launch_decode, "_splits", lambda *_: splits)
    check(Case((97, 3), seqlen_q, window=20), "triton")


def test_splits_follow_the_capacity_alone():
    inputs = make(Case((200, 1)))
    counts = []

    def count(*args):
        counts.append(original(*args))
        return counts[-1]

    original = launch_decode._splits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_decode, "_splits", count)
        inputs.run("triton")
        inputs.call["cache_seqlens"] = torch.ones_like(inputs.call["cache_seqlens"])
        inputs.run("triton")
    assert counts[0] == counts[1] > 1


def test_lengths_past_the_cache_are_cut():
    """On a GPU nobody looks at lengths: too long ones must not be read or written past the end."""
    from extrope_kernels.ops.attention.frames import Call
    from extrope_kernels.ops.attention.kvcache_arguments import KVCache
    from extrope_kernels.ops.attention.regions import ReRope

    k = torch.randn(2, 20, 1, 16, device=device())
    buffer = torch.full((4, 20, 1, 16), torch.nan, device=device())
    buffer[1:3] = k
    cache = buffer[1:3]
    seqlens = torch.tensor([18, 25], dtype=torch.int32, device=device())
    call = Call(ReRope(8), methods.rope(16).inv_freq.to(device()), keys_stored=True)
    kv = KVCache(cache, cache.clone(), seqlens)
    new = torch.zeros(2, 4, 1, 16, device=device())
    launch_decode.append(kv, new, new, call)
    assert not cache[0, 18:].any() and torch.equal(cache[1], k[1])
    assert buffer[3].isnan().all()
    out, _ = launch_decode.decode(k[:, :1], kv, call)
    assert out.isfinite().all()
