"""Calls over a key/value cache as data: what they must return, and what they must write."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support import rounding
from support.attention_oracle import (
    check_outputs,
    closed_form,
    plain_formula,
    rotate,
    rounding_noise,
)
from support.score_examples import (
    EXAMPLES,
    PLAIN,
    Example,
    blockwise_causal,
    example,
    rerope,
)
from torch import Tensor

from extrope_kernels import RopeFreqs, methods, rope_attention_with_kvcache, scores
from extrope_kernels.testing import device

RAW = example(scores.rerope, rerope, window=8)
# With the examples of score methods, other factors of ReRoPE, and amplitudes that decay.
SCORES: dict[str, dict] = {
    **{name: {"example": one} for name, one in EXAMPLES.items()},
    "no score": {"example": PLAIN},
    "far leaky": {"example": example(scores.leaky_rerope, rerope, window=3, factor=16.0)},
    "inverse leaky": {"example": example(scores.leaky_rerope, rerope, window=9, factor=1 / 16)},
    "xpos": {
        "example": example(scores.blockwise_causal, blockwise_causal, block_size=16), "xpos": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A cache and the queries at its end."""

    lengths: tuple[int, ...] = (37, 5)  # keys of each sequence, new ones included
    seqlen_q: int = 1
    counts: tuple[int, ...] | None = None  # of packed queries of each sequence, not seqlen_q
    tail: int = 0  # rows behind the packed ones, of no sequence
    appended: bool = False  # the queries' own keys and values are given to the call
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
    freqs_per_head: bool = False  # of k
    softcap: float = 0.0
    sliding_window: int | None = None
    sinks: bool = False
    query_scale: bool = False
    head_dim_v: int | None = None  # that of q and k
    fp8: bool = False  # the cache is float8_e4m3fn
    raw: bool = False  # its keys are as they came
    own: bool = False  # its keys, and queries, are rotated to their own positions
    seed: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many queries each sequence has."""
        return self.counts or (self.seqlen_q,) * len(self.lengths)

    def rows(self, *shape: int) -> tuple[int, ...]:
        """The shape of q, with these last dimensions."""
        if self.counts is not None:
            return sum(self.counts) + self.tail, *shape
        return len(self.lengths), self.seqlen_q, *shape

    def options(self, generator: torch.Generator) -> dict:
        names = ("log_n", "softmax_scale", "interleaved", "rotary_offset", "softcap")
        names += ("sliding_window",)
        options = {name: getattr(self, name) for name in names}
        options["stored"] = "raw" if self.raw else None
        options["rotated"] = "qk" if self.own else None
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.sinks:
            sinks = 2 * torch.randn(self.heads_q, generator=generator)
            options["sinks"] = sinks.to(device(), wide)
        if self.query_scale:
            scale = 0.5 + torch.rand(self.rows(), generator=generator)
            options["query_scale"] = scale.to(device())
        return options

    def frequencies(self, generator: torch.Generator) -> RopeFreqs:
        freqs = methods.xpos(self.rotary_dim) if self.xpos else methods.rope(self.rotary_dim)
        inv_freq = freqs.inv_freq
        if self.freqs_per_sequence:
            inv_freq = inv_freq * (0.5 + torch.rand(len(self.lengths), 1, generator=generator))
        if self.freqs_per_head:
            scale = 0.5 + torch.rand(1, self.heads_k, 1, generator=generator)
            inv_freq = inv_freq.view(-1, 1, inv_freq.shape[-1]) * scale
        return replace(freqs, inv_freq=inv_freq, attention_factor=self.attention_factor)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    freqs: RopeFreqs
    example: Example
    call: dict  # the keyword arguments of the public function
    tokens: tuple[int, ...]

    def run(self, backend: str | None = None, **changes) -> tuple[Tensor, Tensor]:
        """changes: of tensors or keyword arguments."""
        tensors = [changes.pop(n, getattr(self, n)) for n in ("q", "k_cache", "v_cache")]
        return rope_attention_with_kvcache(
            *tensors, self.freqs, self.example.score, **{**self.call, **changes},
            return_lse=True, backend=backend,
        )  # fmt: skip

    def of_sequence(self, x: Tensor, b: int) -> Tensor:
        """Rows of one sequence, of a tensor like q."""
        if "cu_seqlens_q" not in self.call:
            return x[b]
        begin = sum(self.tokens[:b])
        return x[begin : begin + self.tokens[b]]

    def span(self, b: int) -> range:
        """The slots of one sequence's keys, new ones included."""
        pads, new = self.call.get("cache_leftpad"), "k" in self.call
        end = self.call["cache_seqlens"][b].item() + (self.tokens[b] if new else 0)
        return range(0 if pads is None else pads[b].item(), end)

    def inv_freq(self, b: int) -> Tensor:
        """(pairs,) of one sequence, or (heads, pairs)."""
        inv_freq = self.freqs.inv_freq
        return inv_freq if inv_freq.dim() == 1 else inv_freq[b if len(inv_freq) > 1 else 0]

    def store(self, k: Tensor, j: Tensor, b: int, sign: int = 1) -> Tensor:
        """Keys (keys, heads, d) in float64, rotated to where the cache has them; sign -1: back."""
        places, score = j, self.example.score
        if self.call["rotated"] == "qk":  # new ones are written as they come
            return k.double() if sign > 0 else self.raw(k, j, b)
        if score is not None:
            places = score.stored(j.cpu()).to(k.device)
        places = torch.zeros_like(j) if self.call["stored"] == "raw" else places
        # (keys, heads or 1, pairs or 1)
        places = {1: places[:, None, None], 2: places[:, None], 3: places}[places.dim()]
        return self._rotated(k, sign * places, self.inv_freq(b), 1.0)

    def raw(self, x: Tensor, j: Tensor, b: int) -> Tensor:
        """Rows (rows, heads, d) of q or k at their own positions j, rotated back: float64."""
        if self.call["rotated"] != "qk":
            return x.double()
        inv_freq = self.inv_freq(b)
        if inv_freq.dim() == 2:
            inv_freq = inv_freq.repeat_interleave(x.shape[1] // len(inv_freq), 0)
        return self._rotated(x, -j[:, None, None], inv_freq, 1 / self.freqs.attention_factor)

    def _rotated(self, x: Tensor, places: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
        freqs = replace(self.freqs, inv_freq=inv_freq, attention_factor=factor)
        layout = self.call["interleaved"], self.call["rotary_offset"]
        return rotate(x.double(), places, freqs, *layout, -1)


def make(case: Case) -> Inputs:
    """Random tensors with NaN in every slot that no sequence uses, or that the call writes to."""
    generator = torch.Generator().manual_seed(case.seed)
    batch = len(case.lengths)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device(), case.dtype)

    leftpad = case.leftpad or (0,) * batch
    ends = [pad + length for pad, length in zip(leftpad, case.lengths)]
    capacity = max(ends, default=0) + 3
    q = randn(*case.rows(case.heads_q, case.head_dim))
    shape = (batch, capacity, case.heads_k, case.head_dim)
    if case.appended:
        ends = [end - new for end, new in zip(ends, case.tokens)]
    call = {"cache_seqlens": torch.tensor(ends, dtype=torch.int32, device=device())}
    if case.page_size is not None:
        pages = -(-capacity // case.page_size)
        shape = (batch * pages + 2, case.page_size, *shape[2:])
        order = torch.randperm(batch * pages, generator=generator) + 1
        call["block_table"] = order.to(torch.int32).view(batch, pages).to(device())
    k, v = randn(*shape), randn(*shape[:3], case.head_dim_v or case.head_dim)
    if case.leftpad is not None:
        call["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32, device=device())
    if case.counts is not None:
        bounds = torch.tensor((0, *case.counts)).cumsum(0)
        call["cu_seqlens_q"] = bounds.to(torch.int32).to(device())
    call |= case.options(generator)
    freqs = case.frequencies(generator).to(device())
    inputs = Inputs(q, k, v, freqs, case.example, call, case.tokens)
    used = torch.zeros(shape[:2], dtype=torch.bool, device=device())
    for b in range(batch):
        used[index(inputs, b, inputs.span(b))] = True
    k, v = (x.masked_fill(~used[..., None, None], torch.nan) for x in (k, v))
    if case.appended:
        call |= {"k": randn(*case.rows(*k.shape[2:])), "v": randn(*case.rows(*v.shape[2:]))}
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


def by_formula(formula, inputs: Inputs, wide: torch.dtype, **how) -> tuple[Tensor, Tensor]:
    """out (rows, heads, d) and lse (rows, heads) of all sequences, of keys taken back to raw.

    wide: the dtype of values, and of sums with `plain_formula`.
    """
    names = ("log_n", "interleaved", "rotary_offset", "softcap", "sinks")
    known = {name: inputs.call[name] for name in names if name in inputs.call}
    known["scale"] = inputs.call["softmax_scale"]
    caches = dequantized(inputs)
    outs = [inputs.q.new_zeros(0, inputs.q.shape[-2], caches[1].shape[-1], dtype=wide)]
    lses = [inputs.q.new_zeros(0, inputs.q.shape[-2], dtype=wide)]
    for b, tokens in enumerate(inputs.tokens):
        span = inputs.span(b)
        k, v = (x[index(inputs, b, span)] for x in caches)
        relative = inputs.example.relative(tokens, len(k))
        relative = relative.within(inputs.call["sliding_window"])
        if "query_scale" in inputs.call:
            known["query_scale"] = inputs.of_sequence(inputs.call["query_scale"], b)[None]
        j = torch.arange(len(k), dtype=torch.float64, device=k.device)
        inv_freq = inputs.inv_freq(b)
        freqs = replace(inputs.freqs, inv_freq=inv_freq if inv_freq.dim() < 2 else inv_freq[None])
        q = inputs.raw(inputs.of_sequence(inputs.q, b), j[len(j) - tokens :], b)
        own = q, inputs.store(k, j, b, sign=-1), v.to(wide)
        out, lse = formula(*(x[None] for x in own), relative, freqs, **known, **how)
        outs.append(out[0])
        lses.append(lse[0].T)
    return torch.cat(outs), torch.cat(lses)


def in_rows(inputs: Inputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a call as `by_formula` has them; what belongs to no sequence is 0."""
    if "cu_seqlens_q" not in inputs.call:
        return out.flatten(0, 1), lse.mT.flatten(0, 1)
    rows = sum(inputs.tokens)
    assert not out[rows:].any() and (lse[:, rows:] == -torch.inf).all()
    return out[:rows], lse.T[:rows]


def check(case: Case, backend: str, inputs: Inputs | None = None, noise=(0.0, 0.0)) -> None:
    """Fail where out or lse is out of the error budget, `noise` added to that of each, or the
    cache is not as it has to be.
    """
    inputs = inputs or make(case)
    before = [bits(x).clone() for x in (inputs.k_cache, inputs.v_cache)]
    out, lse = inputs.run(backend)
    check_caches(inputs, before)
    wide = torch.promote_types(case.dtype, torch.float32)
    assert out.dtype == case.dtype and lse.dtype == wide
    out, lse = in_rows(inputs, out, lse)
    exact = by_formula(closed_form, inputs, torch.float64)
    of_pairs = case.example.by_pair or case.freqs_per_head
    if of_pairs:  # which the plain formula does not know
        reads = {name: x for name, x in inputs.call.items() if name not in ("k", "v")}
        ends = [inputs.span(b).stop for b in range(len(case.lengths))]
        reads["cache_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device())
        same = in_rows(inputs, *replace(inputs, call=reads).run("reference"))
    else:
        same = by_formula(plain_formula, inputs, wide, dtype=case.dtype)
    if noise == (0.0, 0.0) and (rounding.is_counted(backend) or of_pairs):
        of_out, of_lse = rounding.of_cache(case, inputs, *dequantized(inputs))
        counted = rounding.is_counted(backend) and case.dtype == torch.float32
        noise = of_out if counted else 0.0, of_lse  # the reference's lse is not of rounded rows
    if case.dtype == torch.float32 and (case.sinks or case.softcap or case.query_scale or of_pairs):
        # Of weights that are exp2 of a logit less lse, as of attention without a cache.
        v = dequantized(inputs)[1].nan_to_num()
        of_weights = rounding_noise("dv", v, exact[1], None, inputs.q, v, v, 1.0)
        noise = noise[0] + of_weights, noise[1]
    same = same[0].to(case.dtype), same[1].to(wide)
    check_outputs(backend, inputs.q, (out, lse), same, exact, noise)
    assert not out[lse == -torch.inf].any()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def check_caches(inputs: Inputs, before: list[Tensor]) -> None:
    """New keys are where the score stores them, new values as they came; the rest is as before."""
    caches, fp8 = (inputs.k_cache, inputs.v_cache), "k_scale" in inputs.call
    for b, new in enumerate(inputs.tokens if "k" in inputs.call else ()):
        first = len(inputs.span(b)) - new
        rows = index(inputs, b, inputs.span(b)[first:])
        k, v = (inputs.of_sequence(inputs.call[name], b) for name in "kv")
        want = inputs.store(k, first + torch.arange(new, device=k.device).double(), b)
        if fp8:  # saturates
            want = quantized(want, scale := inputs.call["k_scale"]).double() * scale[:, None]
        error = (dequantized(inputs)[0][rows] - want).abs()
        eps = 2.0**-3 if fp8 else torch.finfo(k.dtype).eps
        if rounding.is_counted("cpu") and not fp8:
            eps *= 5 / 4  # rounded: cosine, sine, a product, the sum, and the other product too
        assert not new or error.max() <= eps * want.abs().max()
        v = quantized(v, inputs.call["v_scale"]) if fp8 else v
        assert torch.equal(bits(caches[1])[rows], bits(v.contiguous()))
        for old, now in zip(before, caches):
            old[rows] = bits(now)[rows]
    for old, now in zip(before, caches):
        assert torch.equal(old, bits(now))
