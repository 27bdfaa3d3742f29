"""Generated attention of PermuteFormer: any shape, stride, dtype and option, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from hypothesis import strategies as st
from support.generated import (
    DTYPES,
    LAYOUTS,
    cumulative,
    generated,
    laid_out,
    lengths,
    randn,
    seeds,
)
from support.permuteformer_oracle import Mode, dense, last_state
from torch import Tensor

from extrope_kernels import (
    head_permutations,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
)
from extrope_kernels.ops._tables.checks import narrowed
from extrope_kernels.ops.permuteformer import reference
from extrope_kernels.ops.permuteformer.permutations import Powers
from extrope_kernels.ops.permuteformer.scans import Call
from extrope_kernels.testing import assert_within_budget, device

LENGTHS = st.one_of(st.integers(0, 60), st.sampled_from((0, 1, 47, 48, 49, 97, 101, 193, 397)))
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 72, 128, 256)))
RATES = (0.01, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
NAMES = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    tensors: tuple[Tensor, Tensor, Tensor]
    permutations: Tensor
    options: dict
    bounds: list[int] | None = None  # of packed sequences

    def run(self, *qkv: Tensor, **changes) -> Tensor:
        options = {**self.options, **changes}
        return permuteformer_attention(*qkv, permutations=self.permutations, **options)

    @property
    def mode(self) -> Mode:
        heads_q, heads_k = (x.shape[-2] for x in self.tensors[:2])
        rates = self.options["decay"]
        if rates is None:
            wide = torch.promote_types(self.tensors[0].dtype, torch.float32)
            rates = torch.sigmoid(
                2 + 3 * torch.arange(heads_k, dtype=wide, device=device()) / heads_k
            )
        rates = rates.double().repeat_interleave(heads_q // rates.shape[0])
        causal = self.options["causal"]
        return Mode(rates if causal else torch.ones_like(rates), causal, self.options["normalize"])

    def permuted(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        arguments = {name: self.options.get(name) for name in ("positions", "cu_seqlens")}
        return permute_qk(q, k, self.permutations, backend="reference", **arguments)

    def sequences(self, *tensors: Tensor) -> list[list[Tensor]]:
        """The same part of each: (tokens, heads, dim) of every sequence."""
        if self.bounds is None:
            return [list(rows) for rows in zip(*tensors)]
        return [[x[a:b] for x in tensors] for a, b in zip(self.bounds, self.bounds[1:])]

    def together(self, rows: list[Tensor], like: Tensor) -> Tensor:
        if not rows:
            return like.double()
        return torch.cat(rows) if self.bounds is not None else torch.stack(rows)

    def exact(self, *qkv: Tensor) -> Tensor:
        q, k, v = qkv
        rows = [dense(*x, self.mode) for x in self.sequences(*self.permuted(q, k), v)]
        return self.together(rows, q.new_empty((*q.shape[:-1], v.shape[-1])))

    def sizes(self, dout: Tensor) -> dict[str, float]:
        """The largest sums of absolute terms behind out and gradients.

        Of values and gradients without signs the reference's own passes are such sums.
        """
        q, k, v, dout = (x.double() for x in (*self.tensors[:2], self.tensors[2].abs(), dout.abs()))
        at = self.options.get("positions")
        offset = at if isinstance(at, int) else 0
        cu_seqlens = narrowed(self.options.get("cu_seqlens"))
        powers = Powers(self.permutations, None if at is offset else at, cu_seqlens, offset)
        mode = self.mode
        decay = mode.rates if mode.causal else None
        call = Call(len(mode.rates), decay, cu_seqlens, mode.causal, mode.normalize)
        out, den = reference.forward(q, k, v, powers, call)[:2]
        saved = (-out, den) if mode.normalize else (None, None)
        found = {"out": most(out)}
        for name, x in zip(NAMES, reference.backward(dout, q, k, v, *saved, powers, call)):
            found[name] = most(x)
        return found


@dataclass(frozen=True)
class Rounding:
    """How far results may be off because sums are rounded.

    A rounding in float32 moves a partial sum by half an eps of it; c of them, independent, by half
    an eps times the root of c / 3 on average, and five times that at most in the millions of
    numbers of a run. The longest chains are of dims, and of tokens those of a chunk and then the
    chunks (see permuteformer_attention).
    """

    case: Case

    def noise(self, size: float) -> float:
        q, _, v = self.case.tensors
        wide = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
        tokens = q.shape[-3]
        chain = q.shape[-1] + v.shape[-1] + min(tokens, 64) + tokens / 48
        return 5 * wide / 2 * (chain / 3) ** 0.5 * size


@st.composite
def decays(draw, heads_q: int, heads_k: int) -> Tensor | None:
    heads = draw(st.sampled_from((None, heads_k, heads_q)))
    if heads is None:
        return None
    rates = draw(st.lists(st.sampled_from(RATES), min_size=heads, max_size=heads))
    # Kernels take them in float32, which is no matter of rounding in a sum.
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    return torch.tensor(rates).to(device(), dtype)


@st.composite
def cases(draw, dtypes=DTYPES, only_causal=False, packs=True) -> Case:
    heads_k = draw(st.integers(1, 3))
    heads_q = heads_k * draw(st.integers(1, 3))
    dim, value_dim = draw(HEAD_DIMS), draw(HEAD_DIMS)
    options = {"causal": only_causal or draw(st.booleans()), "normalize": draw(st.booleans())}
    options["decay"] = draw(decays(heads_q, heads_k)) if options["causal"] else None
    bounds = None
    if packs and draw(st.booleans()):
        sizes = draw(lengths(60))
        options["cu_seqlens"] = cumulative(sizes, draw(st.sampled_from((torch.int32, torch.int64))))
        bounds = options["cu_seqlens"].tolist()
        leading = bounds[-1:]
    else:
        leading = (draw(st.integers(0, 2)), draw(LENGTHS))
    kind = draw(st.sampled_from(("none", "int", "token")))
    if kind == "int":
        options["positions"] = draw(st.integers(-(2**40), 2**40))
    if kind == "token":
        generator = torch.Generator().manual_seed(draw(seeds()))
        options["positions"] = torch.randint(-(2**40), 2**40, leading[-1:], generator=generator).to(
            device()
        )
    dtype, seed = draw(st.sampled_from(dtypes)), draw(seeds())
    tensors = tuple(
        laid_out(randn(seed + n, *leading, *shape, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
        for n, shape in enumerate(((heads_q, dim), (heads_k, dim), (heads_k, value_dim)))
    )
    return Case(tensors, head_permutations(heads_k, dim).to(device()), options, bounds)


def most(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@generated(examples=60, case=cases(), seed=seeds())
def test_forward(case, seed):
    before = [x.clone() for x in case.tensors]
    out = case.run(*case.tensors)
    assert all(torch.equal(x, y) for x, y in zip(case.tensors, before))
    same = case.run(*case.tensors, backend="reference")
    exact = case.exact(*(x.double() for x in case.tensors))
    error = Rounding(case)
    noise = error.noise(case.sizes(exact)["out"])
    assert_within_budget("out", out, same, exact, noise=noise)


@generated(examples=60, case=cases(), seed=seeds(), layout=st.sampled_from(LAYOUTS))
def test_gradients(case, seed, layout):
    dtype, (q, _, v) = case.tensors[0].dtype, case.tensors
    dout = laid_out(randn(seed, *q.shape[:-1], v.shape[-1], dtype=dtype), layout)

    def gradients(run, dtype, **changes):
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in case.tensors]
        return torch.autograd.grad(run(*leaves, **changes), leaves, dout.to(dtype))

    found = gradients(case.run, dtype)
    same = gradients(case.run, dtype, backend="reference")
    if q.numel() == 0:
        assert all(torch.equal(x, y) for x, y in zip(found, same))
        return
    exact, sizes = gradients(case.exact, torch.float64), case.sizes(dout)
    error = Rounding(case)
    for name, *grads in zip(NAMES, found, same, exact):
        assert_within_budget(name, *grads, noise=error.noise(sizes[name]))


@generated(
    case=cases(only_causal=True, packs=False),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_steps(case, cuts):
    """Any cut of the sequence gives its rows, and the state after its last one."""
    tensors = tuple(x.contiguous() for x in case.tensors)
    tokens, options = tensors[0].shape[1], dict(case.options)
    del options["causal"]
    given = options.pop("positions", 0)
    at = given + torch.arange(tokens, device=device()) if isinstance(given, int) else given
    edges, outs, state = sorted({0, tokens, *(n for n in cuts if n < tokens)}), [], None
    for a, b in pairwise(edges):
        rows = [x[:, a:b] for x in tensors]
        before = [x.clone() for x in state] if state else []
        out, after = permuteformer_step(
            *rows, state, permutations=case.permutations, positions=at[a:b], **options
        )
        assert all(torch.equal(x, y) for x, y in zip(state or (), before))
        state = after
        outs.append(out)
    if not outs or not tensors[0].numel():
        return
    whole = replace(case, tensors=tensors)
    same = whole.run(*tensors, backend="reference")
    exact = whole.exact(*(x.double() for x in tensors))
    error = Rounding(whole)
    noise = error.noise(whole.sizes(exact)["out"])
    assert_within_budget("out", torch.cat(outs, 1), same, exact, noise=noise)
    k, v = whole.permuted(*(x.double() for x in tensors[:2]))[1], tensors[2].double()
    exacts, absolute = (last_state(k, x, whole.mode, state.kv.shape[1]) for x in (v, v.abs()))
    for name, got, want, size in zip(("kv", "k"), state, exacts, absolute):
        assert_within_budget(name, got, want.to(got.dtype), want, noise=error.noise(most(size)))
