"""Strategies for generated attention calls: any shape, stride, dtype, method and option.

And how far off what such a call returns may be.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from support import decode_oracle
from support.attention_oracle import largest_gain
from support.generated import LAYOUTS, LOW, cumulative, frequencies, laid_out, lengths, randn, seeds
from support.rounding import Rounding
from support.score_examples import (
    Example,
    blockwise_causal,
    dual_chunk,
    example,
    of_pairs,
    other_frequencies,
    rerope,
    self_extend,
    string,
)
from torch import Tensor

from extrope_kernels import RopeFreqs, scores
from extrope_kernels.scores import PositionMap, Score
from extrope_kernels.testing import device

INF = math.inf
SCORES = ("self_extend", "dual_chunk", "blockwise_causal", "string")


@dataclass(frozen=True)
class Case:
    """The arguments of attention_oracle.check."""

    example: Example
    tensors: tuple[Tensor, Tensor, Tensor]
    freqs: RopeFreqs
    options: dict

    @property
    def error(self) -> Rounding:
        """How far off results may be."""
        q, k, _ = self.tensors
        gain = largest_gain(*vars(self).values())
        if self.freqs.log_decay is not None:  # within a block and its predecessor
            decay = self.freqs.log_decay.abs().max()
            gain *= torch.exp(2 * self.example.parameters["block_size"] * decay).item()
        scale = self.options["softmax_scale"] or q.shape[-1] ** -0.5
        return Rounding(q, k, scale * gain * max(self.freqs.attention_factor**2, 1.0))


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
    return example(scores.leaky_rerope, rerope, window=draw(st.integers(1, 50)), factor=factor)


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
def by_pair(draw, pairs: int) -> Example:
    """A score whose pairs of dims see other positions, stored so or not."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    drawn = torch.rand(pairs, generator=generator).double()
    window = draw(st.integers(1, 50))
    if draw(st.booleans()):
        sizes = {"sizes": (1 + 5 * drawn).round()}
        score = scores.dpe(window, sizes["sizes"])
    else:
        sizes = {"divisors": 0.5 + 8 * drawn}
        score = other_frequencies(window, sizes["divisors"])
    if draw(st.booleans()):
        score = Score(score.name, score.regions, stored=PositionMap())
    return Example(score, functools.partial(of_pairs, window=window, **sizes))


def starts(batch: int) -> st.SearchStrategy:
    """Of no block, of one at a position, of one at a position of each sequence."""
    one = st.integers(0, 60)
    each = st.lists(one, min_size=batch, max_size=batch)
    each = each.map(lambda at: torch.tensor(at, dtype=torch.int32, device=device()))
    return st.one_of(st.just({}), *(
        st.fixed_dictionaries({"q_start": at, "k_start": at}) for at in (one, each)
    ))  # fmt: skip


@st.composite
def cases(draw, dtypes=LOW) -> Case:
    """A call of attention with anything that it takes."""
    heads_k = draw(st.integers(1, 3))
    heads_q = heads_k * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from((8, 16, 24, 40, 64, 128)))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(seeds())
    if draw(st.booleans()):
        sizes = draw(lengths(24))
        options = {"cu_seqlens": cumulative(sizes)}
        batch, leading_q, leading_k = len(sizes), (sum(sizes),), (sum(sizes),)
    else:
        batch, seqlen, options = draw(st.integers(0, 2)), draw(st.integers(0, 45)), {}
        leading_q = (batch, draw(st.one_of(st.just(seqlen), st.integers(0, 45))))
        leading_k = (batch, seqlen)
    freqs = draw(frequencies(head_dim, names=("rope", "yarn", "pi", "ntk_by_parts", "longrope")))
    pairs = freqs.inv_freq.shape[-1]
    example = draw(st.one_of(examples(), examples(), by_pair(pairs)))
    rows = (
        draw(st.sampled_from((1, max(batch, 1)))),
        draw(st.sampled_from((0, 0, heads_k))),
    )
    scale = torch.linspace(0.5, 1.5, rows[0] * max(rows[1], 1), device=freqs.inv_freq.device)
    if rows[1]:
        freqs = replace(freqs, inv_freq=freqs.inv_freq * scale.view(*rows, 1))
    elif rows[0] > 1:
        freqs = replace(freqs, inv_freq=freqs.inv_freq * scale[:, None])
    if example.score.name == "blockwise_causal" and not rows[1] and draw(st.booleans()):
        decay = -torch.linspace(0.0, 0.02, pairs, device=freqs.inv_freq.device)
        freqs = replace(freqs, log_decay=decay)
    options |= {
        "softmax_scale": draw(st.sampled_from((None, 0.05, 0.4))),
        "log_n": draw(st.sampled_from((None, 2, 16.5))),
        "interleaved": draw(st.booleans()),
        "rotary_offset": draw(offsets(head_dim, 2 * pairs)),
        **draw(softmax_options(heads_q, tuple(leading_q))),
        **draw(starts(batch)),
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
    return Case(example, tensors, freqs, options)


@st.composite
def caches(draw) -> decode_oracle.Case:
    """A cache of any kind, and the queries at its end, packed or not, whose keys it may lack."""
    batch = draw(st.integers(1, 3))
    each = {"min_size": batch, "max_size": batch}
    few = st.one_of(st.integers(0, 4), st.sampled_from((33, 140)))
    counts = tuple(draw(st.lists(few, **each))) if draw(st.booleans()) else None
    seqlen_q = draw(st.one_of(st.just(1), st.integers(0, 4), st.sampled_from((33, 140))))
    appended = draw(st.booleans())
    sizes = draw(st.lists(st.integers(0, 60), **each))
    if appended:
        sizes = [n + new for n, new in zip(sizes, counts or (seqlen_q,) * batch)]
    short = max((seqlen_q, *(counts or ()))) < 100  # the formula takes its time with others
    heads_k = draw(st.integers(1, 3 if short else 1))
    head_dim = draw(st.sampled_from((8, 24, 32, 64, 128) if short else (8, 24, 32)))
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
    pads = st.lists(st.integers(0, 9), **each)
    example = draw(st.one_of(examples(), examples(), by_pair(rotary_dim // 2)))
    per_head = draw(st.booleans()) and draw(st.booleans())
    xpos = example.score.name == "blockwise_causal" and not per_head and draw(st.booleans())
    return decode_oracle.Case(
        lengths=tuple(sizes),
        seqlen_q=seqlen_q,
        counts=counts,
        tail=draw(st.integers(0, 2)) if counts else 0,
        appended=appended,
        heads_q=heads_k * draw(st.integers(1, 8 if short else 2)),
        heads_k=heads_k,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rotary_offset=draw(offsets(head_dim, rotary_dim)),
        dtype=draw(st.sampled_from(LOW)),
        example=example,
        xpos=xpos,
        log_n=draw(st.sampled_from((None, 2, 16.5))),
        softmax_scale=draw(st.sampled_from((None, 0.05, 0.4))),
        interleaved=draw(st.booleans()),
        attention_factor=draw(st.sampled_from((1.0, 0.7, 1.3))),
        page_size=draw(st.sampled_from((None, 1, 5, 16))),
        leftpad=tuple(draw(pads)) if draw(st.booleans()) else None,
        freqs_per_sequence=draw(st.booleans()),
        freqs_per_head=per_head,
        softcap=draw(st.sampled_from((0.0, 0.0, 0.8, 30.0))),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 50))),
        sinks=draw(st.booleans()),
        query_scale=draw(st.booleans()),
        head_dim_v=draw(st.sampled_from((None, None, 8, 64))),
        fp8=draw(st.booleans()) and draw(st.booleans()),
        raw=not xpos and draw(st.booleans()) and draw(st.booleans()),
        seed=draw(seeds()),
    )
