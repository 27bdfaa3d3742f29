"""Generated rotations against their formula: any shape, stride, dtype, layout, method, position."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from support.generated import (
    DTYPES,
    LAYOUTS,
    backends,
    cumulative,
    frequencies,
    generated,
    laid_out,
    lengths,
    randn,
    seeds,
)
from support.rope_cases import NORMS, Case, check, check_gradients
from torch import Tensor

from extrope_kernels.testing import available_backends, device


@st.composite
def positions(draw, batch, seqlen, sequences, freqs, packed) -> Tensor | int | None:
    """None, an offset, one offset a sequence, or a position a token, of every shape and dtype."""
    furthest = 300 if freqs.log_decay is not None else 2**24  # exp(position * log_decay)
    shapes = {"token": (seqlen,), "row": (1, seqlen), "offsets": (sequences, 1)}
    if not packed:
        shapes["each"] = (batch, seqlen)
    if freqs.axes is not None:
        shapes["axes"] = (3, 1 if packed else batch, seqlen)
    often = ("axes",) * 4 if freqs.axes is not None else ()
    kind = draw(st.sampled_from(("none", "int", *shapes, *often)))
    if kind == "none":
        return None
    if kind == "int":
        return draw(st.integers(-furthest, furthest))
    generator = torch.Generator().manual_seed(draw(seeds()))
    found = torch.randint(-furthest, furthest, shapes[kind], generator=generator)
    dtype = draw(st.sampled_from((torch.int32, torch.int64, torch.float32, torch.float64)))
    if dtype == torch.float64:
        found = found + 0.25
    found = found.to(device(), dtype)
    if draw(st.booleans()):  # strided
        found = torch.stack((found, found + 1), -1)[..., 0]
    return found


@st.composite
def cases(draw) -> Case:
    batch, seqlen = draw(st.integers(0, 3)), draw(st.integers(0, 20))
    heads_q, heads_k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    head_dim = draw(st.one_of(st.integers(2, 40), st.sampled_from((64, 80, 128, 256))))
    dtype = draw(st.sampled_from(DTYPES))
    options = {"interleaved": draw(st.booleans()), "inverse": draw(st.booleans())}
    leading, sequences = (batch, seqlen), batch
    packed = draw(st.booleans())
    if packed:
        sizes = draw(lengths(9))
        leading, sequences, seqlen = (sum(sizes),), len(sizes), sum(sizes)
        options["cu_seqlens"] = cumulative(sizes, draw(st.sampled_from((torch.int32, torch.int64))))
    freqs = draw(frequencies(head_dim))
    options["rotary_offset"] = draw(st.integers(0, head_dim - 2 * freqs.inv_freq.shape[-1]))
    inv_freq = freqs.inv_freq.to(draw(st.sampled_from((torch.float32, torch.float64))))
    rows = draw(st.sampled_from(("shared", "by sequence", "by head", "by both")))
    if rows == "by sequence" and sequences > 0:
        inv_freq = inv_freq * torch.linspace(0.5, 1.5, sequences, device=device())[:, None]
    elif rows in ("by head", "by both") and sequences > 0:
        heads_k = heads_q
        first = sequences if rows == "by both" else 1
        scale = torch.linspace(0.5, 1.5, first * heads_q, device=device())
        inv_freq = inv_freq * scale.view(first, heads_q, 1)
    freqs = replace(freqs, inv_freq=inv_freq.contiguous())
    if draw(st.booleans()):
        axes = torch.arange(inv_freq.shape[-1], dtype=torch.int32, device=device()) % 3
        freqs = replace(freqs, axes=axes)
    if freqs.log_decay is not None:
        freqs = replace(freqs, decay_origin=draw(st.sampled_from((0.0, 7.5))))
    options["positions"] = draw(positions(*(batch, seqlen), sequences, freqs, packed))
    seed = draw(seeds())
    q = laid_out(randn(seed, *leading, heads_q, head_dim, dtype=dtype), draw(LAYOUT))
    k = laid_out(randn(seed + 1, *leading, heads_k, head_dim, dtype=dtype), draw(LAYOUT))
    weights = {}
    if draw(st.booleans()):
        options["norm_eps"] = draw(st.sampled_from((1e-6, 0.5)))
        which = draw(st.sampled_from((NORMS, NORMS, NORMS[:1], NORMS[1:])))
        together = draw(st.booleans())  # of all heads
        for name, heads in zip(NORMS, (heads_q, heads_k)):
            weight = 0.5 + randn(seed, (heads if together else 1) * head_dim).abs()
            weights[name] = weight.to(draw(st.sampled_from(DTYPES)))
        weights = {name: weights[name] for name in which}
    return Case(q, k, freqs, options, weights)


LAYOUT = st.sampled_from(LAYOUTS)
BACKENDS = backends(available_backends())


@generated(examples=80, case=cases(), backend=BACKENDS)
def test_rotation(case, backend):
    check(case, backend)


@generated(examples=60, case=cases(), backend=BACKENDS, seed=seeds())
def test_gradients(case, backend, seed):
    check_gradients(case, backend, seed)


@generated(case=cases(), backend=BACKENDS)
def test_in_place_has_the_same_bits(case, backend):
    expected = case.run(backend=backend)
    own = replace(case, q=laid_out(case.q, "unaligned"), k=laid_out(case.k, "gaps"))
    around = [x._base if x._base is not None else x for x in (own.q, own.k)]
    outside = [x.isnan().sum() for x in around]
    outs = own.run(backend=backend, inplace=True)
    assert outs[0] is own.q and outs[1] is own.k
    assert torch.equal(outs[0], expected[0]) and torch.equal(outs[1], expected[1])
    assert [x.isnan().sum() for x in around] == outside
