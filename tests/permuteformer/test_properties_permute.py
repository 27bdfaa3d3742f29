"""Generated permutations: any shape, stride, dtype, layout and position, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from support.generated import (
    DTYPES,
    LAYOUTS,
    backends,
    cumulative,
    generated,
    laid_out,
    lengths,
    randn,
    seeds,
)
from torch import Tensor

from extrope_kernels import permute, permute_qk
from extrope_kernels.testing import available_backends, device

BACKENDS = backends(available_backends())
FURTHEST = (100, 2**31 - 100, 2**63 - 100)  # an offset leaves room for the tokens behind it


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    permutations: Tensor
    at: Tensor  # the position of every token, (batch, seqlen) or (total,)
    options: dict

    def run(self, **changes) -> tuple[Tensor, Tensor]:
        return permute_qk(self.q, self.k, self.permutations, **{**self.options, **changes})

    def exact(self, x: Tensor, inverse: bool) -> Tensor:
        """x, its dims taken by the powers of the permutations."""
        dims = powers(self.permutations, self.at, inverse)
        group = x.shape[-2] // self.permutations.shape[0]
        return x.gather(-1, dims.repeat_interleave(group, -2))


def powers(permutations: Tensor, at: Tensor, inverse: bool = False) -> Tensor:
    """(*at.shape, heads, head_dim): c -> pi^p(c), squaring for every bit of p; the last is -2**63.

    Powers of one permutation commute, so that the order of the factors does not matter.
    """
    step = permutations.argsort(-1) if inverse else permutations
    dims = torch.arange(step.shape[-1], device=step.device).expand(*at.shape, *step.shape)
    for bit in range(64):
        factor = step if bit < 63 else step.argsort(-1)
        taken = (at >> bit & 1).bool()[..., None, None]
        dims = torch.where(taken, dims.gather(-1, factor.expand_as(dims)), dims)
        step = step.gather(-1, step)
    return dims


@st.composite
def tables(draw, heads: int, head_dim: int) -> Tensor:
    """Permutations of many cycles or of one, and the one that moves nothing."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    rows = []
    for _ in range(heads):
        kind = draw(st.sampled_from(("any", "any", "identity", "one cycle", "pairs")))
        row = torch.arange(head_dim)
        if kind == "any":
            row = torch.randperm(head_dim, generator=generator)
        elif kind == "one cycle":
            row = row.roll(1)
        elif kind == "pairs":
            row = row.flip(0)
        rows.append(row)
    return torch.stack(rows).to(device())


@st.composite
def positions(draw, index: Tensor, sequence: Tensor, sequences: int):
    """(what is passed, every token's position); index: of each token in its sequence."""
    shapes = {"token": index.shape[-1:], "offsets": (sequences, 1)}
    if index.dim() == 2:
        shapes |= {"row": (1, index.shape[1]), "each": index.shape}
    kind = draw(st.sampled_from(("none", "int", *shapes)))
    if kind == "none":
        return None, index
    furthest = draw(st.sampled_from(FURTHEST))
    if kind == "int":
        offset = draw(st.integers(-furthest, furthest))
        return offset, index + offset
    generator = torch.Generator().manual_seed(draw(seeds()))
    given = torch.randint(-furthest, furthest, shapes[kind], generator=generator).to(device())
    if furthest < 2**31 and draw(st.booleans()):
        given = given.int()
    if draw(st.booleans()):  # strided
        given = torch.stack((given, given + 1), -1)[..., 0]
    if kind == "offsets":
        return given, index + given.long()[:, 0][sequence]
    return given, given.long().expand(index.shape)


@st.composite
def cases(draw, dtypes=DTYPES) -> Case:
    heads_k = draw(st.integers(1, 4))
    heads_q = heads_k * draw(st.integers(1, 4))
    head_dim = draw(st.one_of(st.integers(1, 70), st.sampled_from((72, 128, 256, 1000, 1024))))
    options = {"inverse": draw(st.booleans())}
    if draw(st.booleans()):
        sizes = draw(lengths(12))
        options["cu_seqlens"] = cumulative(sizes, draw(st.sampled_from((torch.int32, torch.int64))))
        index = torch.cat([torch.arange(n) for n in sizes])
        sequence = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        sequences = len(sizes)
    else:
        sequences, seqlen = draw(st.integers(0, 3)), draw(st.integers(0, 20))
        index = torch.arange(seqlen).expand(sequences, seqlen)
        sequence = torch.arange(sequences)[:, None].expand(sequences, seqlen)
    index, sequence = index.to(device()), sequence.to(device())
    options["positions"], at = draw(positions(index, sequence, sequences))
    dtype, seed, layouts = draw(st.sampled_from(dtypes)), draw(seeds()), st.sampled_from(LAYOUTS)
    q, k = (
        laid_out(randn(seed + n, *index.shape, heads, head_dim, dtype=dtype), draw(layouts))
        for n, heads in enumerate((heads_q, heads_k))
    )
    return Case(q, k, draw(tables(heads_k, head_dim)), at, options)


@generated(examples=40, case=cases(), backend=BACKENDS)
def test_powers(case, backend):
    """The closed form, of one tensor and of two, and nothing that was given changes."""
    given = (case.q, case.k, case.permutations)
    before = [x.clone() for x in given]
    for x, out in zip(given, case.run(backend=backend)):
        assert out.dtype == x.dtype and torch.equal(out, case.exact(x, case.options["inverse"]))
        assert torch.equal(permute(x, case.permutations, backend=backend, **case.options), out)
    assert all(torch.equal(x, y) for x, y in zip(given, before))


@generated(case=cases(), backend=BACKENDS, seed=seeds(), layout=st.sampled_from(LAYOUTS))
def test_gradients(case, backend, seed, layout):
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k)]
    outs = replace(case, q=leaves[0], k=leaves[1]).run(backend=backend)
    douts = [laid_out(randn(seed + n, *x.shape, dtype=x.dtype), layout) for n, x in enumerate(outs)]
    grads = torch.autograd.grad(outs, leaves, douts)
    for grad, dout in zip(grads, douts):
        assert torch.equal(grad, case.exact(dout, not case.options["inverse"]))
