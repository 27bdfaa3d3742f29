"""Attention over a key/value cache from its definition in float64, and what its tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from extrope_kernels import RopeFreqs, methods
from extrope_kernels.ops.attention.kvcache import rerope_attention_with_kvcache
from extrope_kernels.testing import assert_within_budget, device


@dataclass(frozen=True)
class Case:
    """A cache and the queries at its end; keys are raw until `stored`."""

    lengths: tuple[int, ...] = (37, 5)  # keys of each sequence
    seqlen_q: int = 1
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 32
    rotary_dim: int = 32
    dtype: torch.dtype = torch.float32
    window: int = 8
    factor: float = math.inf
    grouped: bool = False
    log_n: float | None = None
    softmax_scale: float | None = None
    interleaved: bool = False
    attention_factor: float = 1.0
    page_size: int | None = None
    leftpad: tuple[int, ...] | None = None
    freqs_per_sequence: bool = False
    seed: int = 0
    extra: dict = field(default_factory=dict)

    def options(self) -> dict:
        names = ("window", "factor", "grouped", "log_n", "softmax_scale", "interleaved")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    freqs: RopeFreqs
    call: dict  # the keyword arguments of the public function

    def run(self, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return rerope_attention_with_kvcache(
            self.q, self.k_cache, self.v_cache, self.freqs, **self.call, return_lse=True,
            backend=backend,
        )  # fmt: skip


def make(case: Case) -> Inputs:
    """Random tensors with NaN in every slot that no sequence uses."""
    generator = torch.Generator().manual_seed(case.seed)
    batch = len(case.lengths)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device(), case.dtype)

    leftpad = case.leftpad or (0,) * batch
    ends = [pad + length for pad, length in zip(leftpad, case.lengths)]
    capacity = max(ends, default=0) + 3
    q = randn(batch, case.seqlen_q, case.heads_q, case.head_dim)
    shape = (batch, capacity, case.heads_k, case.head_dim)
    call = {"cache_seqlens": torch.tensor(ends, dtype=torch.int32, device=device())}
    if case.page_size is not None:
        pages = -(-capacity // case.page_size)
        shape = (batch * pages + 2, case.page_size, *shape[2:])
        order = torch.randperm(batch * pages, generator=generator) + 1
        call["block_table"] = order.to(torch.int32).view(batch, pages).to(device())
    k, v = randn(*shape), randn(*shape)
    if case.leftpad is not None:
        call["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32, device=device())
    freqs = methods.rope(case.rotary_dim)
    inv_freq = freqs.inv_freq
    if case.freqs_per_sequence:
        inv_freq = inv_freq * (0.5 + torch.rand(batch, 1, generator=generator))
    freqs = RopeFreqs(inv_freq.to(device()), case.attention_factor)
    inputs = Inputs(q, k, v, freqs, {**call, **case.options()})
    used = torch.zeros(shape[:2], dtype=torch.bool, device=device())
    for b, (pad, end) in enumerate(zip(leftpad, ends)):
        used[index(inputs, b, range(pad, end))] = True
    return replace(
        inputs,
        k_cache=k.masked_fill(~used[..., None, None], torch.nan),
        v_cache=v.masked_fill(~used[..., None, None], torch.nan),
    )


def index(inputs: Inputs, sequence: int, slots) -> tuple[Tensor, Tensor]:
    """Where these slots of a sequence lie in the first two dimensions of the cache."""
    slots = torch.tensor(list(slots), dtype=torch.long, device=device())
    table = inputs.call.get("block_table")
    if table is None:
        return torch.full_like(slots, sequence), slots
    size = inputs.k_cache.shape[1]
    return table[sequence].long()[slots // size], slots % size


def stored_position(j: Tensor, factor: float, grouped: bool) -> Tensor:
    if math.isinf(factor):
        return torch.zeros_like(j)
    return torch.floor(j / factor) if grouped else j / factor


def relative_position(i: Tensor, j: Tensor, call: dict) -> Tensor:
    """What query i and key j see: the definition."""
    window, factor = call["window"], call["factor"]
    x = i - j
    if call["grouped"]:
        g = int(factor)
        far = torch.floor(i / g) - torch.floor(j / g) + window - window // g
    else:
        far = window + (x - window) / factor
    return torch.where(x < window, x, far)


def turn(x: Tensor, position: Tensor, inv_freq: Tensor, interleaved: bool, dtype=None) -> Tensor:
    """x (..., head_dim) in float64 rotated to positions (...), rounded to dtype."""
    half = inv_freq.shape[-1]
    angle = position[..., None] * inv_freq.double()
    x = x.double()
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
    a, b = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    pair = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    rest = x[..., 2 * half :].expand(*pair.shape[:-1], -1)
    out = torch.cat((pair, rest), -1)
    return out if dtype is None else out.to(dtype).double()


def amplify(q: Tensor, inputs: Inputs) -> Tensor:
    """The attention factor of both sides, on the rotated lanes."""
    lanes = 2 * inputs.freqs.inv_freq.shape[-1]
    return torch.cat((q[..., :lanes] * inputs.freqs.attention_factor**2, q[..., lanes:]), -1)


def sequences(inputs: Inputs):
    """For each: float64 q (seqlen_q, heads_q, d), cached k and v (keys, heads_q, d), positions."""
    pads = inputs.call.get("cache_leftpad")
    group = inputs.q.shape[2] // inputs.k_cache.shape[2]
    for b, end in enumerate(inputs.call["cache_seqlens"].tolist()):
        pad = 0 if pads is None else pads[b].item()
        rows = index(inputs, b, range(pad, end))
        k, v = (
            x[rows].double().repeat_interleave(group, 1) for x in (inputs.k_cache, inputs.v_cache)
        )
        j = torch.arange(len(k), dtype=torch.float64, device=k.device)
        seqlen_q = inputs.q.shape[1]
        i = torch.arange(len(k) - seqlen_q, len(k), dtype=torch.float64, device=k.device)
        freq = inputs.freqs.inv_freq
        yield inputs.q[b].double(), k, v, i, j, freq[b] if freq.dim() == 2 else freq


def softmax(logits: Tensor, i: Tensor, j: Tensor, inputs: Inputs, v: Tensor, dtype=None):
    """(out, lse) of logits (seqlen_q, heads, keys) before their scale; weights rounded to dtype."""
    scale = inputs.call["softmax_scale"] or inputs.q.shape[-1] ** -0.5
    logits = logits * scale
    if log_n := inputs.call["log_n"]:
        logits = (
            logits * (torch.log(i.clamp(min=0) + 1) / math.log(log_n)).clamp(min=1)[:, None, None]
        )
    logits = logits.masked_fill((j > i[:, None])[:, None], -torch.inf)
    if len(j) == 0:
        return torch.zeros_like(logits @ v.to(logits.dtype).transpose(0, 1)[0]), logits.sum(
            -1
        ) - torch.inf
    lse = logits.logsumexp(-1)
    top = logits.max(-1, keepdim=True).values.clamp(min=-1e30)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if dtype is not None:
        weights = weights.to(dtype).to(v.dtype)
    out = torch.einsum("ihj,jhd->ihd", weights, v) / total.clamp(min=1e-30)
    return out, lse


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """From the relative positions: keys taken back to raw, queries turned by what each key sees."""
    call, outs, lses = inputs.call, [], []
    for q, k, v, i, j, freq in sequences(inputs):
        raw = turn(
            k,
            -stored_position(j, call["factor"], call["grouped"])[:, None],
            freq,
            call["interleaved"],
        )
        relative = relative_position(i[:, None], j, call)
        turned = turn(amplify(q, inputs)[:, None], relative[..., None], freq, call["interleaved"])
        out, lse = softmax(torch.einsum("ijhd,jhd->ihj", turned, raw), i, j, inputs, v)
        outs.append(out)
        lses.append(lse.T)
    return torch.stack(outs), torch.stack(lses)


def same_dtype(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The usual way in q's dtype: rotated q and k and the weights are rounded, sums are float32."""
    call, dtype, outs, lses = inputs.call, inputs.q.dtype, [], []
    wide = torch.promote_types(dtype, torch.float32)
    window, factor, grouped = call["window"], call["factor"], call["grouped"]
    for q, k, v, i, j, freq in sequences(inputs):
        by = (freq, call["interleaved"], dtype)
        u = j - stored_position(j, factor, grouped)
        far = torch.full_like(i, window)
        if grouped:
            far = torch.floor(i / factor) + window - window // int(factor)
        elif not math.isinf(factor):
            far = window + (i - window) / factor
        q = amplify(q, inputs)
        near_q, near_k = turn(q, i[:, None], *by).to(wide), turn(k, u[:, None], *by).to(wide)
        near_scores = torch.einsum("ihd,jhd->ihj", near_q, near_k)
        far_q = turn(q, far[:, None], *by).to(wide)
        far_scores = torch.einsum("ihd,jhd->ihj", far_q, k.to(wide))
        near = (i[:, None] - j < window)[:, None]
        scores = torch.where(near, near_scores, far_scores).float()
        out, lse = softmax(scores, i, j, inputs, v.float(), dtype)
        outs.append(out.to(dtype))
        lses.append(lse.T.float())
    return torch.stack(outs), torch.stack(lses)


def check(
    case: Case, backend: str, inputs: Inputs | None = None, noise: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Fail where out or lse is out of the error budget, `noise` added to that of each."""
    inputs = make(case) if inputs is None else inputs
    out, lse = inputs.run(backend)
    want_out, want_lse = exact(inputs)
    near_out, near_lse = same_dtype(inputs)
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out.transpose(1, 2)[empty].any()
    # The interpreter truncates to bfloat16 (triton-lang/triton issue 11584 and its like).
    truncates = backend == "triton" and case.dtype == torch.bfloat16 and device() == "cpu"
    assert_within_budget("out", out, near_out, want_out, 1.0 if truncates else 0.0, noise[0])
    none = torch.zeros(())
    lse, near_lse, want_lse = (x.masked_fill(empty, 0.0) for x in (lse, near_lse, want_lse))
    assert none.dtype == lse.dtype or case.dtype == torch.float64
    assert_within_budget("lse", lse, near_lse.to(lse.dtype), want_lse, noise=noise[1])
