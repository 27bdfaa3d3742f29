"""Generated attention: any shape, stride, dtype, method and option, against the closed form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import attention_oracle as oracle
import torch
from decode_oracle import Case as CacheCase
from decode_oracle import check as check_cache
from decode_oracle import make as make_cache
from generated import (
    LAYOUTS,
    LOW,
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
from test_merge_attention import parts_and_whole
from torch import Tensor

from extrope_kernels import (
    RopeFreqs,
    blockwise_causal_attention,
    dual_chunk_attention,
    merge_attention,
    rerope_attention,
    string_attention,
)
from extrope_kernels.testing import assert_within_budget, attention_backends, available_backends

INF = math.inf
BACKENDS = backends([name for name in attention_backends() if name != "flash_attn"])


@dataclass(frozen=True)
class Case:
    function: Callable
    relative: Callable  # (seqlen_q, seqlen_k) -> the relative positions
    tensors: tuple[Tensor, Tensor, Tensor]
    freqs: RopeFreqs
    options: dict
    bounds: list[int] | None = None  # of packed sequences

    def run(self, *tensors: Tensor, **changes) -> tuple[Tensor, Tensor]:
        options = {**self.options, **changes}
        if self.bounds is not None:
            options["cu_seqlens"] = cumulative([b - a for a, b in self.pairs()])
        return self.function(*tensors, self.freqs, return_lse=True, **options)

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:]))

    def known(self) -> dict:
        names = {"softmax_scale": "scale", "log_n": "log_n", "interleaved": "interleaved"}
        return {theirs: self.options[name] for name, theirs in names.items()}

    def sequences(self, *others: Tensor):
        """The tensors, and others shaped like out, of every sequence with a batch of one."""
        for n, where in enumerate(self.pairs() if self.bounds else range(len(self.tensors[0]))):
            part = slice(*where) if self.bounds else where
            inv_freq = self.freqs.inv_freq
            freqs = replace(self.freqs, inv_freq=inv_freq[n]) if inv_freq.dim() == 2 else self.freqs
            yield (*[x[part][None] for x in (*self.tensors, *others)], freqs)


@st.composite
def methods(draw) -> tuple[Callable, Callable, dict]:
    """A score method, its definition, and its own arguments."""
    kinds = ("rerope", "leaky", "grouped", "dual_chunk", "blockwise_causal", "string")
    kind = draw(st.sampled_from(kinds))
    if kind == "string":
        shift = draw(st.integers(1, 50))
        own = {"shift": shift, "window": draw(st.integers(0, shift))}
        return string_attention, oracle.string, own
    if kind == "dual_chunk":
        chunk = draw(st.integers(1, 20))
        own = {"chunk_size": chunk, "local_window": draw(st.integers(0, chunk - 1))}
        return dual_chunk_attention, oracle.dual_chunk, own
    if kind == "blockwise_causal":
        own = {"block_size": 2 * draw(st.integers(1, 16))}
        return blockwise_causal_attention, oracle.blockwise_causal, own
    own = {"window": draw(st.integers(1, 50)), "factor": INF, "grouped": False}
    if kind == "leaky":
        own["factor"] = draw(st.sampled_from((1 / 16, 0.5, 1.0, 1.7, 4.0, 16.0)))
    if kind == "grouped":
        group = draw(st.integers(1, 8))
        own = {"window": group * draw(st.integers(1, 6)), "factor": float(group), "grouped": True}
    return rerope_attention, oracle.rerope, own


@st.composite
def cases(draw, dtypes=LOW) -> Case:
    function, relative, own = draw(methods())
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
    if function is blockwise_causal_attention and draw(st.booleans()):
        decay = -torch.linspace(0.0, 0.02, freqs.inv_freq.shape[-1], device=freqs.inv_freq.device)
        freqs = replace(freqs, log_decay=decay)
    options = {
        **own,
        "softmax_scale": draw(st.sampled_from((None, 0.05, 0.4))),
        "log_n": draw(st.sampled_from((None, 2, 16.5))),
        "interleaved": draw(st.booleans()),
    }
    shapes = ((*leading_q, heads_q), (*leading_k, heads_k), (*leading_k, heads_k))
    tensors = tuple(
        laid_out(randn(seed + n, *shape, head_dim, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
        for n, shape in enumerate(shapes)
    )
    relative = functools.partial(relative, **own)
    return Case(function, relative, tensors, freqs, options, bounds)


def norm(x: Tensor) -> float:
    return x.double().norm(dim=-1).max().item() if x.numel() else 0.0


@dataclass(frozen=True)
class Rounding:
    """How far logits and weights may be off when every operand is rounded once.

    A rounding of q and of k moves a logit by eps / 2 of |q| |k| each, a sum in float32 by half an
    eps of that for every term; a weight's relative error is twice that of the logits.
    """

    q: Tensor
    k: Tensor
    logit_scale: float

    @property
    def logit(self) -> float:
        eps, inside = torch.finfo(self.q.dtype).eps, torch.finfo(torch.float32).eps
        largest = norm(self.q) * norm(self.k) * self.logit_scale
        return (eps + (1 + self.q.shape[-1] / 2) * inside) * largest

    def weight(self, keys: int) -> float:
        eps, inside = torch.finfo(self.q.dtype).eps, torch.finfo(torch.float32).eps
        return 2 * self.logit + eps + keys / 2 * inside


def rounding(case: Case, q: Tensor, k: Tensor, freqs: RopeFreqs) -> Rounding:
    gain = 1.0
    if case.options["log_n"]:
        gain = max(1.0, math.log(max(k.shape[1], 1)) / math.log(case.options["log_n"]))
    scale = case.options["softmax_scale"] or q.shape[-1] ** -0.5
    if freqs.log_decay is not None:  # within a block and its predecessor
        gain *= torch.exp(2 * case.options["block_size"] * freqs.log_decay.abs().max()).item()
    return Rounding(q, k, scale * gain * max(freqs.attention_factor**2, 1.0))


@generated(case=cases(), backend=BACKENDS)
def test_forward(case, backend):
    before = [x.clone() for x in case.tensors]
    out, lse = case.run(*case.tensors, backend=backend)
    assert out.shape == case.tensors[0].shape and out.dtype == case.tensors[0].dtype
    assert all(torch.equal(x, y) for x, y in zip(case.tensors, before))
    lse = lse.transpose(-1, -2)
    for q, k, v, own_out, own_lse, freqs in case.sequences(out, lse[..., None]):
        relative = case.relative(q.shape[1], k.shape[1])
        exact, exact_lse = oracle.closed_form(q, k, v, relative, freqs, **case.known())
        plain, plain_lse = oracle.plain_formula(q, k, v, relative, freqs, **case.known())
        error = rounding(case, q, k, freqs)
        noise = error.weight(k.shape[1]) * norm(v)
        assert_within_budget("out", own_out, plain, exact, noise=noise)
        own_lse = own_lse[..., 0].transpose(1, 2)
        seen = exact_lse > -INF
        assert torch.equal(own_lse > -INF, seen)
        found = (own_lse[seen], plain_lse[seen].to(own_lse.dtype), exact_lse[seen])
        assert_within_budget("lse", *found, noise=error.logit)


@generated(case=cases((torch.float32, torch.float16)), backend=BACKENDS, seed=seeds())
def test_gradients(case, backend, seed):
    dout = randn(seed, *case.tensors[0].shape, dtype=case.tensors[0].dtype)
    leaves = [x.detach().clone().requires_grad_() for x in case.tensors]
    grads = torch.autograd.grad(case.run(*leaves, backend=backend)[0], leaves, dout)
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(grads, leaves))
    owned = Case(**{**vars(case), "tensors": (*case.tensors, *grads, dout)})
    for q, k, v, dq, dk, dv, own_dout, freqs in owned.sequences():
        relative = case.relative(q.shape[1], k.shape[1])
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        out, _ = oracle.closed_form(*wide, relative, freqs, **case.known())
        exact = torch.autograd.grad(out, wide, own_dout.double())
        weight = rounding(case, q, k, freqs).weight(k.shape[1])
        scale = rounding(case, q, k, freqs).logit_scale
        score = 2 * norm(own_dout) * norm(v) * scale
        rows = q.shape[1] * q.shape[2] / k.shape[2]  # how many queries add to one key
        noise = (weight * score * norm(k), weight * score * norm(q) * rows,
                 weight * norm(own_dout) * rows)  # fmt: skip
        for name, got, want, own in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, noise):
            assert_within_budget(name, got, want.to(got.dtype), want, noise=own)


@st.composite
def caches(draw) -> CacheCase:
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    heads_k = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((8, 24, 32, 64, 128)))
    function, _, parameters = draw(methods())
    pads = st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes))
    return CacheCase(
        lengths=tuple(sizes),
        seqlen_q=draw(st.integers(0, 4)),
        heads_q=heads_k * draw(st.integers(1, 8)),
        heads_k=heads_k,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        dtype=draw(st.sampled_from(LOW)),
        attention=function.__name__,
        parameters=parameters,
        log_n=draw(st.sampled_from((None, 2, 16.5))),
        softmax_scale=draw(st.sampled_from((None, 0.05, 0.4))),
        interleaved=draw(st.booleans()),
        attention_factor=draw(st.sampled_from((1.0, 0.7, 1.3))),
        page_size=draw(st.sampled_from((None, 1, 5, 16))),
        leftpad=tuple(draw(pads)) if draw(st.booleans()) and sizes else None,
        freqs_per_sequence=draw(st.booleans()),
        seed=draw(seeds()),
    )


@generated(case=caches(), backend=backends(available_backends()))
def test_cache(case, backend):
    inputs = make_cache(case)
    k, v = inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num()
    gain = max(1.0, math.log(max(case.lengths) + 1) / math.log(case.log_n)) if case.log_n else 1.0
    scale = (case.softmax_scale or case.head_dim**-0.5) * gain * max(case.attention_factor, 1) ** 2
    error = Rounding(inputs.q, k, scale)
    noise = (error.weight(max(case.lengths)) * norm(v), error.logit)
    check_cache(case, backend, inputs, noise)


@generated(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    shape=st.tuples(*[st.integers(0, 4)] * 3, st.sampled_from((1, 3, 8))),
    packed=st.booleans(),
    dtype=st.sampled_from(LOW),
    seed=seeds(),
)
def test_merge(sizes, shape, packed, dtype, seed):
    """Attention over parts of the keys, merged, is attention over all of them."""
    outs, lses, (out, lse) = parts_and_whole(sizes, shape[packed:], seed)
    merged, merged_lse = merge_attention(outs, lses)
    seen = lse > -INF
    assert torch.equal(merged_lse > -INF, seen)
    torch.testing.assert_close(merged_lse[seen], lse[seen])
    per_row = seen.transpose(-1, -2)
    torch.testing.assert_close(merged[per_row], out[per_row])
    assert not merged[~per_row].any()
    low = merge_attention([x.nan_to_num().to(dtype) for x in outs], [x.float() for x in lses])
    exact = merge_attention([x.nan_to_num().to(dtype).double() for x in outs],
                            [x.float().double() for x in lses])  # fmt: skip
    assert_within_budget("out", low[0], exact[0].to(dtype), exact[0])
