"""Attention over a key/value cache from its definition in float64, and what its tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import rounding
import torch
from attention_oracle import closed_form, rounding_noise, split
from rope_oracle import INTERPRETED
from score_examples import (
    EXAMPLES,
    PLAIN,
    Example,
    blockwise_causal,
    example,
    indices,
    rerope,
)
from torch import Tensor

from extrope_kernels import RopeFreqs, methods, rope_attention_with_kvcache, scores
from extrope_kernels.testing import assert_within_budget, device

RAW = example(scores.rerope, rerope, window=8)
# With the examples of score methods, other factors of ReRoPE, and amplitudes that decay.
SCORES: dict[str, dict] = {
    **{name: {"example": one} for name, one in EXAMPLES.items()},
    "no score": {"example": PLAIN},
    "far leaky": {"example": example(scores.rerope, rerope, window=3, factor=16.0)},
    "inverse leaky": {"example": example(scores.rerope, rerope, window=9, factor=1 / 16)},
    "xpos": {
        "example": example(scores.blockwise_causal, blockwise_causal, block_size=16), "xpos": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A cache and the queries at its end."""

    lengths: tuple[int, ...] = (37, 5)  # keys of each sequence
    seqlen_q: int = 1
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 32
    rotary_dim: int = 32
    rotary_offset: int = 0
    dtype: torch.dtype = torch.float32
    example: Example = RAW
    xpos: bool = False
    log_n: float | None = None
    softmax_scale: float | None = None
    interleaved: bool = False
    attention_factor: float = 1.0
    page_size: int | None = None
    leftpad: tuple[int, ...] | None = None
    freqs_per_sequence: bool = False
    softcap: float = 0.0
    sliding_window: int | None = None
    sinks: bool = False
    query_scale: bool = False
    head_dim_v: int | None = None  # that of q and k
    fp8: bool = False  # the cache is float8_e4m3fn
    raw: bool = False  # its keys are as they came
    seed: int = 0

    def options(self, generator: torch.Generator) -> dict:
        names = ("log_n", "softmax_scale", "interleaved", "rotary_offset", "softcap")
        names += ("sliding_window",)
        options = {name: getattr(self, name) for name in names}
        options["stored"] = "raw" if self.raw else None
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.sinks:
            sinks = 2 * torch.randn(self.heads_q, generator=generator)
            options["sinks"] = sinks.to(device(), wide)
        if self.query_scale:
            scale = 0.5 + torch.rand(len(self.lengths), self.seqlen_q, generator=generator)
            options["query_scale"] = scale.to(device())
        return options


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    freqs: RopeFreqs
    example: Example
    call: dict  # the keyword arguments of the public function

    def run(self, backend: str | None = None, **changes) -> tuple[Tensor, Tensor]:
        """changes: of tensors or keyword arguments."""
        tensors = [changes.pop(n, getattr(self, n)) for n in ("q", "k_cache", "v_cache")]
        return rope_attention_with_kvcache(
            *tensors, self.freqs, self.example.score, **{**self.call, **changes},
            return_lse=True, backend=backend,
        )  # fmt: skip

    def stored(self, j: Tensor) -> Tensor:
        if self.call["stored"] == "raw":
            return torch.zeros_like(j)
        return j if self.example.score is None else self.example.score.stored(j)

    @property
    def layout(self) -> tuple[bool, int]:
        return self.call["interleaved"], self.call["rotary_offset"]

    def store(self, k: Tensor, j: Tensor, inv_freq: Tensor, sign: int = 1) -> Tensor:
        """Keys (keys, heads, d) in float64, rotated to where the cache has them; sign -1: back."""
        return self.rotate_keys(k, sign * self.stored(j), inv_freq)

    def rotate_keys(self, k: Tensor, by: Tensor, inv_freq: Tensor, dtype=None) -> Tensor:
        decay = self.freqs.log_decay
        decay = None if decay is None else -decay
        return rotate(k, by[:, None], inv_freq, *self.layout, dtype, decay)

    def rotate_queries(self, q: Tensor, to: Tensor, inv_freq: Tensor, dtype=None) -> Tensor:
        begin = self.call["rotary_offset"]
        q = q.clone()
        q[..., begin : begin + 2 * inv_freq.shape[-1]] *= self.freqs.attention_factor**2
        return rotate(q, to, inv_freq, *self.layout, dtype, self.freqs.log_decay)


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
    k, v = randn(*shape), randn(*shape[:3], case.head_dim_v or case.head_dim)
    if case.leftpad is not None:
        call["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32, device=device())
    freqs = methods.xpos(case.rotary_dim) if case.xpos else methods.rope(case.rotary_dim)
    inv_freq = freqs.inv_freq
    if case.freqs_per_sequence:
        inv_freq = inv_freq * (0.5 + torch.rand(batch, 1, generator=generator))
    freqs = replace(freqs, inv_freq=inv_freq, attention_factor=case.attention_factor).to(device())
    call |= case.options(generator)
    inputs = Inputs(q, k, v, freqs, case.example, call)
    used = torch.zeros(shape[:2], dtype=torch.bool, device=device())
    for b, (pad, end) in enumerate(zip(leftpad, ends)):
        used[index(inputs, b, range(pad, end))] = True
    k, v = (x.masked_fill(~used[..., None, None], torch.nan) for x in (k, v))
    if case.fp8:
        scales = (0.003 + 0.01 * torch.rand(2, case.heads_k, generator=generator)).to(device())
        call |= dict(zip(("k_scale", "v_scale"), scales))
        k, v = (quantized(x, scale) for x, scale in zip((k, v), scales))
    return replace(inputs, k_cache=k, v_cache=v)


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    """Rows (..., heads, head_dim) over the scales of their heads, as float8_e4m3fn."""
    return (x.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


def dequantized(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The caches in float64."""
    caches = inputs.k_cache.double(), inputs.v_cache.double()
    if "k_scale" not in inputs.call:
        return caches
    scales = inputs.call["k_scale"].double(), inputs.call["v_scale"].double()
    return caches[0] * scales[0][:, None], caches[1] * scales[1][:, None]


def index(inputs: Inputs, sequence: int, slots) -> tuple[Tensor, Tensor]:
    """Where these slots of a sequence lie in the first two dimensions of the cache."""
    slots = torch.tensor(list(slots), dtype=torch.long, device=device())
    table = inputs.call.get("block_table")
    if table is None:
        return torch.full_like(slots, sequence), slots
    size = inputs.k_cache.shape[1]
    return table[sequence].long()[slots // size], slots % size


def rotate(
    x: Tensor,
    position: Tensor,
    inv_freq: Tensor,
    interleaved: bool,
    rotary_offset: int,
    dtype=None,
    decay=None,
):
    """x (..., head_dim) in float64 rotated to positions (...), rounded to dtype."""
    angle = position[..., None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    if decay is not None:
        amplitude = torch.exp(position[..., None] * decay.double())
        cos, sin = cos * amplitude, sin * amplitude
    a, b, rest = split(x.double(), inv_freq.shape[-1], interleaved, rotary_offset)
    a, b = a * cos - b * sin, b * cos + a * sin
    pair = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    rest = rest.expand(*pair.shape[:-1], -1)
    out = torch.cat((rest[..., :rotary_offset], pair, rest[..., rotary_offset:]), -1)
    return out if dtype is None else out.to(dtype).double()


def sequences(inputs: Inputs):
    """For each: float64 q (seqlen_q, heads_q, d), cached k and v (keys, heads_q, d), frequencies,
    and what the queries see of the keys.
    """
    pads, caches = inputs.call.get("cache_leftpad"), dequantized(inputs)
    group = inputs.q.shape[2] // inputs.k_cache.shape[2]
    for b, end in enumerate(inputs.call["cache_seqlens"].tolist()):
        pad = 0 if pads is None else pads[b].item()
        rows = index(inputs, b, range(pad, end))
        k, v = (x[rows].repeat_interleave(group, 1) for x in caches)
        relative = inputs.example.relative(inputs.q.shape[1], len(k))
        relative = relative.within(inputs.call["sliding_window"])
        freq = inputs.freqs.inv_freq
        yield inputs.q[b].double(), k, v, freq[b] if freq.dim() == 2 else freq, relative


def softmax(logits: Tensor, seen: Tensor, inputs: Inputs, b: int, v: Tensor, dtype: torch.dtype):
    """(out, lse) of logits (seqlen_q, heads, keys) before their scale; weights rounded to dtype."""
    logits = logits * (inputs.call["softmax_scale"] or inputs.q.shape[-1] ** -0.5)
    if log_n := inputs.call["log_n"]:
        i, _ = indices(*seen.shape)
        scale = (torch.log(i.clamp(min=0) + 1) / math.log(log_n)).clamp(min=1)
        logits = logits * scale[..., None].to(logits.device)
    if "query_scale" in inputs.call:
        logits = logits * inputs.call["query_scale"][b].to(logits.dtype)[:, None, None]
    if softcap := inputs.call["softcap"]:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(seen.isnan()[:, None].to(logits.device), -torch.inf)
    if "sinks" in inputs.call:  # as one more key, whose value is zero
        sink = inputs.call["sinks"].to(logits.dtype)[:, None].expand(len(logits), -1, 1)
        logits = torch.cat((logits, sink), -1)
        v = torch.cat((v, v.new_zeros(1, v.shape[1] or sink.shape[1], v.shape[2])))
    if logits.shape[-1] == 0:
        lse = logits.sum(-1) - torch.inf
        return lse.new_zeros(*lse.shape, v.shape[-1]), lse
    top = logits.max(-1, keepdim=True).values.clamp(min=-1e30)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True).clamp(min=1e-30)
    out = torch.einsum("ihj,jhd->ihd", weights.to(dtype).to(v.dtype), v) / total
    return out, logits.logsumexp(-1)


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """By the closed form of attention, of keys taken back to raw."""
    names = ("log_n", "interleaved", "rotary_offset", "softcap", "sinks")
    known = {name: inputs.call[name] for name in names if name in inputs.call}
    known["scale"] = inputs.call["softmax_scale"]
    outs, lses = [], []
    for b, (q, k, v, freq, relative) in enumerate(sequences(inputs)):
        if "query_scale" in inputs.call:
            known["query_scale"] = inputs.call["query_scale"][b]
        j = torch.arange(len(k), dtype=torch.float64, device=k.device)
        raw = inputs.store(k, j, freq, sign=-1)
        freqs = replace(inputs.freqs, inv_freq=freq)
        out, lse = closed_form(q[None], raw[None], v[None], relative, freqs, **known)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.stack(outs), torch.stack(lses)


def same_dtype(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The usual way in q's dtype: rotated q and k and the weights are rounded, sums are float32."""
    dtype, outs, lses = inputs.q.dtype, [], []
    wide = torch.promote_types(dtype, torch.float32)
    for b, (q, k, v, freq, relative) in enumerate(sequences(inputs)):
        stored = inputs.stored(torch.arange(len(k), dtype=torch.float64))
        logits = torch.zeros((), dtype=wide, device=k.device)
        for mask, at_i, at_j in relative.branches:
            on = (at_j.reshape(-1) - stored).to(k.device)
            keys = inputs.rotate_keys(k, on, freq, dtype).to(wide)
            queries = inputs.rotate_queries(q, at_i.to(k.device), freq, dtype).to(wide)
            scores = torch.einsum("ihd,jhd->ihj", queries, keys)
            logits = torch.where(mask[:, None].to(k.device), scores, logits)
        out, lse = softmax(logits.float(), relative.seen, inputs, b, v.float(), dtype)
        outs.append(out.to(dtype))
        lses.append(lse.T.float())
    return torch.stack(outs), torch.stack(lses)


def check(case: Case, backend: str, inputs: Inputs | None = None, noise=(0.0, 0.0)) -> None:
    """Fail where out or lse is out of the error budget, `noise` added to that of each."""
    inputs = inputs or make(case)
    out, lse = inputs.run(backend)
    want_out, want_lse = exact(inputs)
    near_out, near_lse = same_dtype(inputs)
    if rounding.is_counted(backend) and noise == (0.0, 0.0):
        of_out, of_lse = rounding.of_cache(case, inputs, *dequantized(inputs))
        noise = (of_out if case.dtype == torch.float32 else 0.0, of_lse)
    if case.dtype == torch.float32 and (case.sinks or case.softcap or case.query_scale):
        # Of weights that are exp2 of a logit less lse, as of attention without a cache.
        v = dequantized(inputs)[1].nan_to_num()
        more = rounding_noise("dv", v, want_lse, None, inputs.q, v, v, 1.0)
        noise = noise[0] + more, noise[1]
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out.transpose(1, 2)[empty].any()
    # The interpreter truncates to bfloat16 (triton-lang/triton issue 11584 and its like).
    truncates = backend == "triton" and case.dtype == torch.bfloat16 and INTERPRETED
    assert_within_budget("out", out, near_out, want_out, 1.0 if truncates else 0.0, noise[0])
    assert lse.dtype == torch.promote_types(torch.float32, case.dtype)
    lse, near_lse, want_lse = (x.masked_fill(empty, 0.0) for x in (lse, near_lse, want_lse))
    assert_within_budget("lse", lse, near_lse.to(lse.dtype), want_lse, noise=noise[1])
