"""Region attention in Triton, on a GPU or interpreted, against dense masks in float64.

Tiles are 16 x 16 here: small enough for every border to fall inside, on and beside a tile.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attention_oracle import rounding_noise
from rope_oracle import DEVICE, INTERPRETED, Guarded

from extrope_kernels.ops.attention.regions import FIRST_KEY, Layout
from extrope_kernels.ops.attention.triton import backward, configs, forward, launch
from extrope_kernels.testing import assert_within_budget

TILE = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    small = configs.Config(TILE, TILE, warps=1, stages=1)
    monkeypatch.setattr(launch, "config", lambda *_: small)


def layout(starts, granularity=1, head_dim=16, row_scale=None, cu_seqlens=None) -> Layout:
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    return Layout(starts, granularity, 0.8 / math.sqrt(head_dim), row_scale, cu_seqlens)


def inputs(regions, seqlen_q, seqlen_k, heads_q=1, heads_k=1, head_dim=16, dtype=torch.float32):
    """q and k in as many frames as there are regions, and v; a batch of one."""

    def randn(seqlen: int, heads: int) -> Tensor:
        return torch.randn(1, seqlen, heads, head_dim).to(DEVICE, dtype)

    q = [randn(seqlen_q, heads_q) for _ in range(regions)]
    k = [randn(seqlen_k, heads_k) for _ in range(regions)]
    return q, k, randn(seqlen_k, heads_k)


def regions_of(by: Layout, seqlen_q: int, seqlen_k: int) -> Tensor:
    """(seqlen_q, seqlen_k): the region that holds each pair, -1 where i does not see j."""
    region = torch.full((seqlen_q, seqlen_k), -1)
    bounds = [0, seqlen_k] if by.cu_seqlens is None else by.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        for row in range(begin, end) if by.cu_seqlens is not None else range(seqlen_q):
            position = row - begin if by.cu_seqlens is not None else row + seqlen_k - seqlen_q
            block = position // by.granularity * by.granularity
            for r, start in enumerate(by.starts):
                first = max(0, block + start)
                region[row, begin + first : begin + max(0, position + 1)] = r
    return region


def dense(q, k, v, by: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse with all scores at once, products in `dtype`, the softmax at least in float32."""
    group = q[0].shape[-2] // v.shape[-2]
    region = regions_of(by, q[0].shape[-3], v.shape[-3]).to(v.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = torch.full((), -torch.inf, dtype=wide, device=v.device)
    for r, (q_r, k_r) in enumerate(zip(q, k)):
        k_r = k_r.to(dtype).repeat_interleave(group, -2)
        products = torch.einsum("...ihd,...jhd->...hij", q_r.to(dtype), k_r).to(wide)
        scores = torch.where(region == r, products * by.softmax_scale, scores)
    if by.row_scale is not None:
        scores = scores * by.row_scale.to(wide)[:, None]
    empty = (region == -1).all(-1)
    scores = scores.masked_fill(empty[:, None], 0.0)
    weights = scores.softmax(-1).masked_fill(empty[:, None], 0.0).to(dtype)
    out = torch.einsum("...hij,...jhd->...ihd", weights, v.to(dtype).repeat_interleave(group, -2))
    return out, scores.logsumexp(-1).masked_fill(empty, -torch.inf)


def dense_gradients(dout, dlse, q, k, v, by, dtype) -> list[Tensor]:
    """Of q's frames, of k's, and of v, by autograd."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*q, *k, v)]
    out, lse = dense(leaves[: len(q)], leaves[len(q) : -1], leaves[-1], by, dtype)
    total = (out * dout.to(dtype)).sum()
    if dlse is not None:
        total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


def compare(name: str, got: Tensor, same_dtype: Tensor, exact: Tensor, noise: float = 0.0) -> None:
    """The error budget and `noise`, and one of bfloat16 where the interpreter truncates to it."""
    truncates = INTERPRETED and got.dtype == torch.bfloat16
    finite = exact.masked_fill(exact == -torch.inf, 0.0)
    assert torch.equal(exact == -torch.inf, got == -torch.inf), name
    got = got.masked_fill(got == -torch.inf, 0.0)
    same_dtype = same_dtype.masked_fill(same_dtype == -torch.inf, 0.0).to(got.dtype)
    assert_within_budget(name, got, same_dtype, finite, 1.0 if truncates else 0.0, noise)


def check(q, k, v, by: Layout, dlse: Tensor | None = None, dout: Tensor | None = None) -> tuple:
    """Forward and, with dout, backward against the dense formulas. Returns what the kernels did."""
    out, lse = forward(q, k, v, by)
    same, same_lse = dense(q, k, v, by, v.dtype)
    exact, exact_lse = dense(q, k, v, by, torch.float64)
    compare("out", out, same, exact)
    compare("lse", lse, same_lse, exact_lse)
    if dout is None:
        return out, lse
    dq, dk, dv = backward(dout, dlse, q, k, v, out, lse, by)
    same = dense_gradients(dout, dlse, q, k, v, by, v.dtype)
    exact = dense_gradients(dout, dlse, q, k, v, by, torch.float64)
    names = [f"d{x}[{r}]" for x in "qk" for r in range(len(q))] + ["dv"]
    for name, grad, ref, ideal in zip(names, (*dq, *dk, dv), same, exact, strict=True):
        assert grad.dtype == (v.dtype if name == "dv" else torch.float32), name
        noise = rounding_noise(name, ideal, exact_lse, dout, q, k, v, by.softmax_scale)
        compare(name, grad, ref, ideal, noise if grad.dtype == torch.float32 else 0.0)
    return out, lse, dq, dk, dv


def check_backward(q, k, v, by: Layout, with_dlse: bool = True) -> tuple:
    dout = torch.randn(q[0].shape).to(q[0])
    *batch, seqlen, heads, _ = q[0].shape
    dlse = torch.randn(*batch, heads, seqlen, device=DEVICE) if with_dlse else None
    return check(q, k, v, by, dlse, dout)


REGIONS = {
    "plain": layout((FIRST_KEY,)),
    "window": layout((-8,)),
    "blockwise": layout((-10,), 10),
    "rerope": layout((FIRST_KEY, -6)),
    "two_of_a_window": layout((-24, -6)),
    "three": layout((FIRST_KEY, -20, -7)),
    "dual_chunk": layout((FIRST_KEY, -10, 0), 10),
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions(name):
    by = REGIONS[name]
    check_backward(*inputs(len(by.starts), 37, 37), by)


@pytest.mark.parametrize("window", (1, 2, TILE - 1, TILE, TILE + 1, 36, 37))
def test_windows(window):
    check_backward(*inputs(2, 37, 37), layout((FIRST_KEY, 1 - window)))


@pytest.mark.parametrize(
    "seqlens", ((1, 1), (1, 37), (17, 41), (41, 17), (32, 32), (0, 5), (5, 0), (0, 0)), ids=str
)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_lengths(name, seqlens):
    by = REGIONS[name]
    out, lse, *grads = check_backward(*inputs(len(by.starts), *seqlens), by)
    empty = max(0, seqlens[0] - seqlens[1])
    assert torch.all(out[:, :empty] == 0) and torch.all(lse[..., :empty] == -torch.inf)
    assert torch.all(grads[0][0][:, :empty] == 0)


@pytest.mark.parametrize("cu_seqlens", ([0, 0, 17, 17, 18, 37, 37], [0, 32], [0, 0]), ids=str)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_packed_sequences(name, cu_seqlens):
    total, starts = cu_seqlens[-1], REGIONS[name].starts
    row_scale = 0.5 + torch.rand(total, device=DEVICE)
    by = layout(starts, REGIONS[name].granularity, row_scale=row_scale, cu_seqlens=cu_seqlens)
    q, k, v = inputs(len(starts), total, total)
    check_backward([x[0] for x in q], [x[0] for x in k], v[0], by)


def test_packed_equals_each_sequence_alone():
    bounds = [0, 0, 17, 18, 40]
    q, k, v = ([x[0] for x in y] if isinstance(y, list) else y[0] for y in inputs(2, 40, 40))
    packed, _ = forward(q, k, v, layout((FIRST_KEY, -6), cu_seqlens=bounds))
    for begin, end in itertools.pairwise(bounds):
        cut = slice(begin, end)
        alone, _ = forward(
            [x[None, cut] for x in q], [x[None, cut] for x in k], v[None, cut], REGIONS["rerope"]
        )
        assert torch.equal(alone[0], packed[cut])


@pytest.mark.parametrize("heads", ((3, 1), (4, 1)), ids=str)
def test_query_heads_share_keys(heads):
    check_backward(*inputs(2, 17, 17, *heads), REGIONS["rerope"])


def test_batch_and_row_scale():
    row_scale = 0.5 + torch.rand(18, device=DEVICE)
    q, k, v = (
        [torch.cat((x, x.flip(1))) for x in y] if isinstance(y, list) else torch.cat((y, -y))
        for y in inputs(2, 18, 29, 2, 1)
    )
    check_backward(q, k, v, layout((FIRST_KEY, -6), row_scale=row_scale), with_dlse=False)


@pytest.mark.parametrize("head_dim", (8, 24, 64, 96, 200, 256))
def test_head_dims(head_dim):
    check_backward(*inputs(2, 19, 19, head_dim=head_dim), layout((FIRST_KEY, -6), 1, head_dim))


@pytest.mark.parametrize("head_dim", (32, 72))
def test_rows_in_two_parts(head_dim, monkeypatch):
    halves = configs.Config(TILE, TILE, warps=1, stages=1, halves=True)
    monkeypatch.setattr(launch, "config", lambda *_: halves)
    check_backward(*inputs(2, 21, 21, head_dim=head_dim), layout((FIRST_KEY, -6), 1, head_dim))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_low_precision(name, dtype):
    by = REGIONS[name]
    check_backward(*inputs(len(by.starts), 35, 35, dtype=dtype), by)


def test_the_same_bits_every_time():
    q, k, v = inputs(2, 19, 19, 2, 1, dtype=torch.float16)
    dout = torch.randn_like(q[0])
    runs = []
    for _ in range(2):
        out, lse = forward(q, k, v, REGIONS["rerope"])
        dq, dk, dv = backward(dout, None, q, k, v, out, lse, REGIONS["rerope"])
        runs.append((out, lse, *dq, *dk, dv))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_strides_and_nothing_around(packed, monkeypatch):
    """Heads before tokens, in buffers of NaN; and outputs in such buffers, found whole after."""

    def strided(x: Tensor) -> Tensor:
        _, seqlen, heads, dim = x.shape
        strides = (heads * seqlen * dim + 8, dim, seqlen * dim + 8, 1)
        inside = Guarded(tuple(x.shape), strides, x.dtype).tensor
        inside.copy_(x)
        return inside[0] if packed else inside

    outputs = []

    def guarded(like: Tensor, dtype: torch.dtype) -> Tensor:
        contiguous = torch.empty(like.shape, device="meta").stride()
        outputs.append(Guarded(tuple(like.shape), contiguous, dtype))
        return outputs[-1].tensor

    monkeypatch.setattr(launch, "_empty", guarded)
    q, k, v = inputs(2, 19, 19, 2, 1, head_dim=24)
    q, k, v, dout = [strided(x) for x in q], [strided(x) for x in k], strided(v), strided(q[0])
    dlse = torch.randn(1, device=DEVICE).expand(*dout.shape[:-3], 2, 19)
    cu_seqlens = [0, 11, 19] if packed else None
    check(q, k, v, layout((FIRST_KEY, -6), 1, 24, cu_seqlens=cu_seqlens), dlse, dout)
    assert len(outputs) == 8
    for output in outputs:
        output.assert_untouched_around()
        assert not output.tensor.isnan().any()


def test_tokens_too_far_apart_for_offsets_of_a_tile():
    q, _, v = inputs(1, 2, 2)
    far = torch.empty_strided((1, 2, 1, 16), (0, 2**24, 0, 1), device="meta")
    with pytest.raises(ValueError, match="less than 16777216 elements apart, got strides"):
        forward(q, [far], v, REGIONS["plain"])
