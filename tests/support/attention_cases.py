"""Strategies for generated attention calls: any shape, stride, dtype, method and option.

And how far off what such a call returns may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import decode_oracle
import torch
from generated import LAYOUTS, LOW, cumulative, frequencies, laid_out, lengths, randn, seeds
from hypothesis import strategies as st
from rounding import Rounding
from score_examples import (
    Example,
    Relative,
    blockwise_causal,
    dual_chunk,
    example,
    rerope,
    self_extend,
    string,
)
from torch import Tensor

from extrope_kernels import RopeFreqs, rope_attention, scores

INF = math.inf
SCORES = ("self_extend", "dual_chunk", "blockwise_causal", "string")


@dataclass(frozen=True)
class Case:
    example: Example
    tensors: tuple[Tensor, Tensor, Tensor]
    freqs: RopeFreqs
    options: dict
    bounds: list[int] | None = None  # of packed sequences

    def run(self, *tensors: Tensor, **changes) -> tuple[Tensor, Tensor]:
        options = {**self.options, **changes}
        if self.bounds is not None:
            options["cu_seqlens"] = cumulative([b - a for a, b in self.pairs()])
        return rope_attention(*tensors, self.freqs, self.example.score, return_lse=True, **options)

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:]))

    def known(self, part) -> dict:
        """What the closed form is told of one sequence."""
        names = {"softmax_scale": "scale"} | {
            name: name for name in ("log_n", "interleaved", "rotary_offset", "softcap", "sinks")
        }
        known = {theirs: self.options[name] for name, theirs in names.items()}
        if (scale := self.options["query_scale"]) is not None:
            known["query_scale"] = scale[part] if self.bounds or scale.dim() == 2 else scale
        return known

    def seen(self, seqlen_q: int, seqlen_k: int) -> Relative:
        return self.example.relative(seqlen_q, seqlen_k).within(self.options["sliding_window"])

    def sequences(self, *others: Tensor):
        """The tensors, and others shaped like out, of every sequence with a batch of one; its
        frequencies, and the rest that the closed form is told.
        """
        for n, where in enumerate(self.pairs() if self.bounds else range(len(self.tensors[0]))):
            part = slice(*where) if self.bounds else where
            inv_freq = self.freqs.inv_freq
            freqs = replace(self.freqs, inv_freq=inv_freq[n]) if inv_freq.dim() == 2 else self.freqs
            yield (*[x[part][None] for x in (*self.tensors, *others)], freqs, self.known(part))


@st.composite
def examples(draw) -> Example:
    """A score method, with any parameters."""
    kind = draw(st.sampled_from(("rerope", "leaky", *SCORES)))
    if kind == "string":
        shift = draw(st.integers(1, 50))
        return example(scores.string, string, shift=shift, window=draw(st.integers(0, shift)))
    if kind == "dual_chunk":
        chunk = draw(st.integers(1, 20))
        local = draw(st.integers(0, chunk - 1))
        return example(scores.dual_chunk, dual_chunk, chunk_size=chunk, local_window=local)
    if kind == "blockwise_causal":
        half = draw(st.integers(1, 16))
        return example(scores.blockwise_causal, blockwise_causal, block_size=2 * half)
    if kind == "self_extend":
        group = draw(st.integers(1, 8))
        window = group * draw(st.integers(1, 6))
        return example(scores.self_extend, self_extend, window=window, factor=group)
    factor = draw(st.sampled_from((1 / 16, 0.5, 1.0, 1.7, 4.0, 16.0))) if kind == "leaky" else INF
    return example(scores.rerope, rerope, window=draw(st.integers(1, 50)), factor=factor)


@st.composite
def softmax_options(draw, heads_q: int, rows: tuple[int, ...]) -> dict:
    """Caps, sinks, windows and temperatures, each there or not; rows: (batch, seqlen_q)."""
    options = {
        "softcap": draw(st.sampled_from((0.0, 0.0, 0.8, 30.0))),
        "sliding_window": draw(st.one_of(st.none(), st.integers(1, 50))),
        "sinks": None,
        "query_scale": None,
    }
    if draw(st.booleans()):
        options["sinks"] = 3 * randn(draw(seeds()), heads_q, dtype=torch.float32)
    if draw(st.booleans()):
        shape = rows if draw(st.booleans()) else rows[-1:]
        options["query_scale"] = 0.5 + randn(draw(seeds()), *shape, dtype=torch.float32).abs()
    return options


def offsets(head_dim: int, rotary_dim: int) -> st.SearchStrategy[int]:
    """The first rotated dim: even ones."""
    return st.integers(0, (head_dim - rotary_dim) // 2).map(lambda n: 2 * n)


@st.composite
def cases(draw, dtypes=LOW) -> Case:
    score = draw(examples())
    heads_k = draw(st.integers(1, 3))
    heads_q = heads_k * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from((8, 16, 24, 40, 64, 128)))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(seeds())
    bounds = None
    if draw(st.booleans()):
        sizes = draw(lengths(24))
        bounds = cumulative(sizes).tolist()
        batch, leading_q, leading_k = len(sizes), bounds[-1:], bounds[-1:]
    else:
        batch, seqlen = draw(st.integers(0, 2)), draw(st.integers(0, 45))
        leading_q = (batch, draw(st.one_of(st.just(seqlen), st.integers(0, 45))))
        leading_k = (batch, seqlen)
    freqs = draw(frequencies(head_dim, names=("rope", "yarn", "pi", "ntk_by_parts", "longrope")))
    if draw(st.booleans()) and batch > 0:
        rows = torch.linspace(0.5, 1.5, batch, device=freqs.inv_freq.device)[:, None]
        freqs = replace(freqs, inv_freq=freqs.inv_freq * rows)
    if score.score.name == "blockwise_causal" and draw(st.booleans()):
        decay = -torch.linspace(0.0, 0.02, freqs.inv_freq.shape[-1], device=freqs.inv_freq.device)
        freqs = replace(freqs, log_decay=decay)
    options = {
        "softmax_scale": draw(st.sampled_from((None, 0.05, 0.4))),
        "log_n": draw(st.sampled_from((None, 2, 16.5))),
        "interleaved": draw(st.booleans()),
        "rotary_offset": draw(offsets(head_dim, 2 * freqs.inv_freq.shape[-1])),
        **draw(softmax_options(heads_q, tuple(leading_q))),
    }
    head_dim_v = draw(st.sampled_from((head_dim, head_dim, 8, 64)))
    shapes = (
        (*leading_q, heads_q, head_dim),
        (*leading_k, heads_k, head_dim),
        (*leading_k, heads_k, head_dim_v),
    )
    tensors = tuple(
        laid_out(randn(seed + n, *shape, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
        for n, shape in enumerate(shapes)
    )
    return Case(score, tensors, freqs, options, bounds)


@st.composite
def caches(draw) -> decode_oracle.Case:
    """A cache, and the queries at its end."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    heads_k = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((8, 24, 32, 64, 128)))
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
    pads = st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes))
    return decode_oracle.Case(
        lengths=tuple(sizes),
        seqlen_q=draw(st.integers(0, 4)),
        heads_q=heads_k * draw(st.integers(1, 8)),
        heads_k=heads_k,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rotary_offset=draw(offsets(head_dim, rotary_dim)),
        dtype=draw(st.sampled_from(LOW)),
        example=draw(examples()),
        log_n=draw(st.sampled_from((None, 2, 16.5))),
        softmax_scale=draw(st.sampled_from((None, 0.05, 0.4))),
        interleaved=draw(st.booleans()),
        attention_factor=draw(st.sampled_from((1.0, 0.7, 1.3))),
        page_size=draw(st.sampled_from((None, 1, 5, 16))),
        leftpad=tuple(draw(pads)) if draw(st.booleans()) else None,
        freqs_per_sequence=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.8, 30.0))),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 50))),
        sinks=draw(st.booleans()),
        query_scale=draw(st.booleans()),
        head_dim_v=draw(st.sampled_from((None, None, 8, 64))),
        seed=draw(seeds()),
    )


def rounding(case: Case, q: Tensor, k: Tensor, freqs: RopeFreqs) -> Rounding:
    gain = 1.0
    if case.options["log_n"]:
        gain = max(1.0, math.log(max(k.shape[1], 1)) / math.log(case.options["log_n"]))
    if case.options["query_scale"] is not None and q.shape[1]:
        gain *= case.options["query_scale"].max().item()
    scale = case.options["softmax_scale"] or q.shape[-1] ** -0.5
    if freqs.log_decay is not None:  # within a block and its predecessor
        gain *= torch.exp(
            2 * case.example.parameters["block_size"] * freqs.log_decay.abs().max()
        ).item()
    return Rounding(q, k, scale * gain * max(freqs.attention_factor**2, 1.0))
