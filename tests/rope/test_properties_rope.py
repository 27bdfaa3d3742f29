"""Generated rotations against float64: any shape, stride, dtype, layout, method, position."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from generated import (
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
from hypothesis import strategies as st
from torch import Tensor
from truncation import truncation

from extrope_kernels import RopeFreqs, apply_rope_qk
from extrope_kernels.testing import assert_within_budget, available_backends, device


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    freqs: RopeFreqs
    options: dict

    def run(self, **changes) -> tuple[Tensor, Tensor]:
        return apply_rope_qk(self.q, self.k, self.freqs, **{**self.options, **changes})

    def exact(self) -> tuple[Tensor, Tensor]:
        wide = replace(self, q=self.q.double(), k=self.k.double())
        return wide.run(backend="reference")


@st.composite
def positions(draw, batch, seqlen, sequences, freqs, packed) -> Tensor | int | None:
    """None, an offset, one offset a sequence, or a position a token, of every shape and dtype."""
    furthest = 300 if freqs.log_decay is not None else 2**24  # exp(position * log_decay)
    shapes = {"token": (seqlen,), "row": (1, seqlen), "offsets": (sequences, 1)}
    if not packed:
        shapes["each"] = (batch, seqlen)
    if freqs.axes is not None:
        shapes["axes"] = (3, 1 if packed else batch, seqlen)
    kind = draw(st.sampled_from(("none", "int", *shapes)))
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
def cases(draw, dtypes=DTYPES) -> Case:
    batch, seqlen = draw(st.integers(0, 3)), draw(st.integers(0, 20))
    heads_q, heads_k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    head_dim = draw(st.one_of(st.integers(2, 40), st.sampled_from((64, 80, 128, 256))))
    dtype = draw(st.sampled_from(dtypes))
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
    options["positions"] = draw(positions(*(batch, seqlen), sequences, freqs, packed))
    seed = draw(seeds())
    q = laid_out(randn(seed, *leading, heads_q, head_dim, dtype=dtype), draw(LAYOUT))
    k = laid_out(randn(seed + 1, *leading, heads_k, head_dim, dtype=dtype), draw(LAYOUT))
    return Case(q, k, freqs, options)


LAYOUT = st.sampled_from(LAYOUTS)
BACKENDS = backends([name for name in available_backends() if name != "reference"])


@generated(case=cases(), backend=BACKENDS)
def test_rotation(case, backend):
    """The same as the reference in float64, within the budget; nothing that was given changes."""
    before = [x.clone() for x in (case.q, case.k)]
    outs, sames, exacts = case.run(backend=backend), case.run(backend="reference"), case.exact()
    for name, x, out, same, exact in zip("qk", (case.q, case.k), outs, sames, exacts):
        assert out.shape == x.shape and out.dtype == x.dtype
        assert_within_budget(name, out, same, exact, truncation(backend, x.dtype))
    assert torch.equal(case.q, before[0]) and torch.equal(case.k, before[1])


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


@generated(case=cases(), backend=BACKENDS, seed=seeds())
def test_gradients(case, backend, seed):
    """dq, dk and d inv_freq against those of the reference in float64."""

    def gradients(case, backend):
        leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k)]
        leaves.append(case.freqs.inv_freq.detach().clone().requires_grad_())
        freqs = replace(case.freqs, inv_freq=leaves[2])
        outs = replace(case, q=leaves[0], k=leaves[1], freqs=freqs).run(backend=backend)
        douts = [randn(seed + n, *x.shape).to(x.dtype) for n, x in enumerate(outs)]
        return torch.autograd.grad(outs, leaves, douts)

    low = case.q.dtype
    rounded = [randn(seed + n, *x.shape).to(low).double() for n, x in enumerate((case.q, case.k))]
    wide = replace(case, q=case.q.double(), k=case.k.double())
    leaves = [x.detach().clone().requires_grad_() for x in (wide.q, wide.k)]
    leaves.append(case.freqs.inv_freq.double().requires_grad_())
    outs = replace(
        wide, q=leaves[0], k=leaves[1], freqs=replace(case.freqs, inv_freq=leaves[2])
    ).run(backend="reference")
    exact = torch.autograd.grad(outs, leaves, rounded)
    found, same = gradients(case, backend), gradients(case, "reference")
    for name, out, same_dtype, want in zip(("dq", "dk", "dinv_freq"), found, same, exact):
        noise = 0.0
        if name == "dinv_freq":
            noise = _frequency_noise(case, leaves[2], want)
        assert_within_budget(name, out, same_dtype, want, truncation(backend, case.q.dtype), noise)


def _frequency_noise(case: Case, inv_freq: Tensor, exact: Tensor) -> float:
    """d inv_freq sums position * x dx, whose terms may cancel: float32's error of each adds up."""
    if exact.numel() == 0 or case.q.numel() == 0:
        return 0.0
    at = case.options["positions"]
    furthest = case.q.shape[-3] + (
        abs(at) if isinstance(at, int) else 0 if at is None else at.abs().max().item()
    )
    rows = case.q.numel() // case.q.shape[-1] + case.k.numel() // case.k.shape[-1]
    loudest = case.freqs.attention_factor
    if case.freqs.log_decay is not None:
        loudest *= torch.exp(furthest * case.freqs.log_decay.abs().max()).item()
    loudest = max(loudest, 1 / case.freqs.attention_factor)
    wide = torch.float64 if case.q.dtype == torch.float64 else torch.float32
    terms = case.q.double().abs().max() * 5.0 * loudest * furthest  # |dout| < 5
    return 8 * torch.finfo(wide).eps * rows**0.5 * terms.item()
