"""Frequencies of each head, and position maps of each pair of dims: against angles in float64."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from attention_oracle import closed_form, make_qkv, rounding_noise, truncation
from score_examples import PLAIN, indices
from torch import Tensor

from extrope_kernels import (
    RopeFreqs,
    methods,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.scores import FIRST_KEY, PairMap, PositionMap, Region, Score
from extrope_kernels.testing import assert_within_budget, device

SAME = PositionMap()
PAIRS = 14  # of 32 dims: the last four pass through
LOW = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape, seed=0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grouped(window: int, sizes: Tensor) -> Score:
    """SelfExtend with a group size of each pair, and maybe each head."""
    far_q = PairMap(sizes, window - window // sizes, floor=True)
    far_k = PairMap(sizes, floor=True)
    regions = (Region(FIRST_KEY, far_q, far_k), Region(1 - window, SAME, SAME))
    return Score("grouped", regions, stored=far_k)


def stretched(window: int, factors: Tensor) -> Score:
    """Leaky ReRoPE with a factor of each pair, and maybe each head."""
    far_q = PairMap(factors, window - window / factors)
    far_k = PairMap(factors)
    regions = (Region(FIRST_KEY, far_q, far_k), Region(1 - window, SAME, SAME))
    return Score("stretched", regions, stored=far_k)


class Example(NamedTuple):
    score: Score | None
    seen: object  # (i, j) float64 to (heads or 1, i, j, pairs or 1): the distance of each pair
    freqs: RopeFreqs


def near_or(far, window):
    def seen(i, j):
        x = (i - j)[None, ..., None]
        return torch.where(x < window, x, far(i[None, ..., None], j[None, ..., None]))

    return seen


def example(name: str, heads: int = 1, sequences: int = 0) -> Example:
    """By name; heads: of frequencies or maps; sequences: with frequencies of their own."""
    base = methods.rope(2 * PAIRS)
    window, shape = 6, (heads, PAIRS) if heads > 1 else (PAIRS,)
    if name == "groups":
        sizes = (1 + 5 * drawn(*shape)).round()
        by_head = sizes.view(-1, 1, 1, PAIRS)

        def far(i, j):
            return (i // by_head - j // by_head) + window - window // by_head

        found = Example(grouped(window, sizes), near_or(far, window), base)
    elif name == "factors":
        factors = 0.5 + 8 * drawn(*shape, seed=1)
        by_head = factors.view(-1, 1, 1, PAIRS)

        def far(i, j):
            return window + (i - j - window) / by_head

        found = Example(stretched(window, factors), near_or(far, window), base)
    elif name == "turned back":  # keys are stored by one map, and far keys seen by another
        sizes = (1 + 5 * drawn(*shape)).round()
        score = dataclasses.replace(grouped(window, sizes), stored=SAME)
        found = Example(score, example("groups", heads).seen, base)
    elif name == "heads":
        inv_freq = base.inv_freq / (1 + drawn(1, heads, 1, seed=2).float())

        def seen(i, j):
            return (i - j)[None, ..., None]

        found = Example(None, seen, dataclasses.replace(base, inv_freq=inv_freq))
    else:  # a head's frequencies under a score method
        inv_freq = example("heads", heads).freqs.inv_freq
        found = example("factors", 1)._replace(freqs=dataclasses.replace(base, inv_freq=inv_freq))
    freqs = found.freqs
    if sequences:
        rows = freqs.inv_freq if freqs.inv_freq.dim() == 3 else freqs.inv_freq[None]
        scales = 1 + 0.1 * torch.arange(sequences).view(-1, *[1] * (rows.dim() - 1))
        freqs = dataclasses.replace(freqs, inv_freq=(rows * scales).float())
    inv_freq = freqs.inv_freq.to(device())
    return found._replace(freqs=dataclasses.replace(freqs, inv_freq=inv_freq))


def oracle(*tensors, **options) -> Tensor:
    """out of `oracle_and_lse`."""
    return oracle_and_lse(*tensors, **options)[0]


def oracle_and_lse(q, k, v, one: Example, window=None, seen=None, **known):
    """out and lse in float64; known: what else the closed form is told.

    seen: the distances (batch or 1, heads or 1, i, j, pairs or 1), where `one` does not have them.
    """
    lengths = q.shape[1], k.shape[1]
    seen = one.seen(*torch.broadcast_tensors(*indices(*lengths)))[None] if seen is None else seen
    relative = PLAIN.relative(*lengths).within(window)
    return closed_form(q, k, v, relative, one.freqs, distances=seen, **known)


EXAMPLES = [
    ("groups", 1), ("groups", 2), ("factors", 1), ("factors", 2), ("turned back", 1), ("heads", 2),
    ("heads and factors", 2), ("heads", 4), ("factors", 4),
]  # fmt: skip


def qkv(dtype=torch.float32, batch=2, seqlen_q=19, seqlen_k=19):
    return make_qkv(batch, seqlen_q, seqlen_k, heads_q=4, heads_k=2, head_dim=32, dtype=dtype)


@pytest.mark.parametrize(("name", "heads"), EXAMPLES)
def test_the_reference_in_float64(name, heads):
    one = example(name, heads)
    q, k, v = qkv(torch.float64)
    out = rope_attention(q, k, v, one.freqs, one.score, backend="reference")
    torch.testing.assert_close(out, oracle(q, k, v, one), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("name", "heads"), EXAMPLES)
def test_forward(name, heads, dtype, any_backend):
    one = example(name, heads)
    q, k, v = qkv(dtype)
    check_forward(any_backend, (q, k, v), one)


@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("name", "heads"), [("groups", 2), ("heads and factors", 2)])
def test_forward_of_a_part(name, heads, interleaved, sequences, any_backend):
    """The last queries of a sequence, either order of pairs, frequencies of each sequence."""
    one = example(name, heads, sequences)
    check_forward(any_backend, qkv(seqlen_q=5), one, interleaved=interleaved)


def test_forward_in_a_window(any_backend):
    one = example("groups", 2)
    q, k, v = qkv()
    given = {"sliding_window": 9, "backend": any_backend}
    out = rope_attention(q, k, v, one.freqs, one.score, **given)
    same = rope_attention(q, k, v, one.freqs, one.score, **given | {"backend": "reference"})
    assert_within_budget("out", out, same, oracle(q, k, v, one, window=9))


def check_forward(backend, tensors, one: Example, interleaved=False) -> None:
    given = {"interleaved": interleaved, "backend": backend}
    out = rope_attention(*tensors, one.freqs, one.score, **given)
    same = rope_attention(*tensors, one.freqs, one.score, **given | {"backend": "reference"})
    exact = oracle(*tensors, one, interleaved=interleaved)
    noise = truncation(backend, tensors[0], same, exact)
    assert_within_budget("out", out, same, exact, noise=noise)


def test_sinks_of_query_heads_that_have_own_frequencies(any_backend):
    one, (q, k, v) = example("heads", 4), qkv()
    sinks = torch.tensor([3.0, -1.0, 0.5, -2.0], device=q.device)
    out = rope_attention(q, k, v, one.freqs, sinks=sinks, backend=any_backend)
    exact = oracle(q, k, v, one, sinks=sinks)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["groups", "heads and factors"])
def test_packed(name, any_backend):
    """Sequences of 3, 0 and 16 tokens, with frequencies of their own."""
    one, bounds = example(name, 2, 3), [0, 3, 3, 19]
    q, k, v = qkv(batch=1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device())
    packed = (x[0] for x in (q, k, v))
    out = rope_attention(*packed, one.freqs, one.score, cu_seqlens=cu_seqlens, backend=any_backend)
    for s, part in ((0, slice(0, 3)), (2, slice(3, 19))):
        own = one._replace(
            freqs=dataclasses.replace(one.freqs, inv_freq=one.freqs.inv_freq[s : s + 1])
        )
        alone = tuple(x[:, part] for x in (q, k, v))
        same = rope_attention(*alone, own.freqs, own.score, backend="reference")
        assert_within_budget("out", out[None, part], same, oracle(*alone, own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "heads"), [("groups", 2), ("heads and factors", 2), ("heads", 4)])
def test_gradients(name, heads, dtype, any_backend):
    one = example(name, heads)
    inputs = qkv(dtype)
    dout = torch.randn_like(inputs[0])

    def grads(attend, wide):
        leaves = [x.detach().to(wide).requires_grad_() for x in inputs]
        return torch.autograd.grad((attend(*leaves) * dout.to(wide)).sum(), leaves)

    def run(backend):
        return lambda q, k, v: rope_attention(q, k, v, one.freqs, one.score, backend=backend)

    exact = grads(lambda q, k, v: oracle(q, k, v, one), torch.float64)
    same = grads(run("reference"), dtype)
    found = grads(run(any_backend), dtype)
    of_reference = {"backend": "reference", "return_lse": True}
    _, lse = rope_attention(*(x.double() for x in inputs), one.freqs, one.score, **of_reference)
    for name, got, low, want in zip(("dq", "dk", "dv"), found, same, exact, strict=True):
        noise = truncation(any_backend, inputs[0], low, want)
        if dtype == torch.float32:
            noise += rounding_noise(name, want, lse, dout, *inputs, inputs[0].shape[-1] ** -0.5)
        assert_within_budget(name, got, low, want, noise=noise)


# -------------------------------------------------------------------------------------------------
# With a cache


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize(("name", "heads"), [*EXAMPLES[:7]])
def test_decode(name, heads, seqlen_q, dtype, any_backend):
    """New tokens are written, and see the cache as a forward over all tokens sees them."""
    one = example(name, heads)
    lengths = [17, 4]
    q, k, v = qkv(dtype, seqlen_k=24, seqlen_q=24)
    out, same = (
        written_and_seen(one, (q, k, v), lengths, seqlen_q, backend)
        for backend in (any_backend, "reference")
    )
    for b, length in enumerate(lengths):
        part = slice(b, b + 1)
        alone = (q[part, length : length + seqlen_q], k[part], v[part])
        alone = (alone[0], *(x[:, : length + seqlen_q] for x in alone[1:]))
        exact = oracle(*alone, one)
        noise = truncation(any_backend, q, same[part], exact)
        assert_within_budget("out", out[part], same[part], exact, noise=noise)


def written_and_seen(one: Example, tensors, lengths, seqlen_q, backend) -> Tensor:
    """out of the tokens behind `lengths`, which are written after the earlier ones."""
    q, k, v = tensors
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    nothing = torch.zeros(len(lengths), dtype=torch.int32, device=q.device)
    given = {"freqs": one.freqs, "score": one.score, "backend": backend}
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    most = max(lengths)
    first = (x[:, :most] for x in (q, k, v))
    q_all, k_all, v_all = first
    rope_attention_with_kvcache(q_all, **caches, cache_seqlens=nothing, k=k_all, v=v_all, **given)
    in_use = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    rows = [slice(length, length + seqlen_q) for length in lengths]
    new = [torch.stack([x[b, row] for b, row in enumerate(rows)]) for x in (q, k, v)]
    return rope_attention_with_kvcache(
        new[0], **caches, cache_seqlens=in_use, k=new[1], v=new[2], **given
    )


# -------------------------------------------------------------------------------------------------
# Gradients of frequencies, divisors and offsets


@pytest.mark.parametrize("kind", ["batch", "packed", "no score"])
def test_gradients_of_frequencies_and_divisors(kind, any_backend):
    """By every backend as by autograd through the formula of the reference, in float64."""
    q, k, v = qkv(batch=1 if kind == "packed" else 2, seqlen_q=19)
    factors = (0.5 + 8 * drawn(2, PAIRS)).to(q.device).requires_grad_()
    inv_freq = example("heads", 2, 2).freqs.inv_freq.requires_grad_()
    options = {"rotary_offset": 4 if kind == "batch" else 0}
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 5, 19], dtype=torch.int32, device=q.device)
        q, k, v = q[0], k[0], v[0]
    dout = torch.randn_like(q)

    def found(backend, dtype):
        score = None if kind == "no score" else stretched(6, factors)
        tensors = (x.to(dtype) for x in (q, k, v))
        out = rope_attention(*tensors, RopeFreqs(inv_freq), score, backend=backend, **options)
        leaves = (inv_freq,) if score is None else (inv_freq, factors)
        return torch.autograd.grad((out * dout.to(dtype)).sum(), leaves)

    exact = found("reference", torch.float64)
    for name, got, low, want in zip(
        ("inv_freq", "divisor"), found(any_backend, torch.float32),
        found("reference", torch.float32), exact, strict=False,
    ):  # fmt: skip
        # Sums of some hundred terms that were rounded in float32, of which regions are differences.
        noise = 1e-5 * want.abs().max().item()
        assert_within_budget(name, got, low, want.to(got.dtype).double(), noise=noise)


def losses(q, k, v, window=6):
    """A loss of frequencies and divisors by the fused kernels, and both."""

    def loss(inv_freq, divisors):
        score = scores.far_frequencies(window, divisors)
        return rope_attention(q, k, v, RopeFreqs(inv_freq), score).square().sum()

    inv_freq = example("heads", 2).freqs.inv_freq
    return loss, (inv_freq, (0.5 + 8 * drawn(PAIRS)).to(q.device))


def test_gradients_of_frequencies_within_torch_func():
    loss, leaves = losses(*qkv())
    shifted = tuple(x + 0.1 for x in leaves)
    want = []
    for given in (leaves, shifted):
        given = [x.clone().requires_grad_() for x in given]
        want.append(torch.autograd.grad(loss(*given), given))
    found = torch.func.grad(loss, (0, 1))(*leaves)
    by_freq = torch.func.grad(lambda inv_freq: loss(inv_freq, leaves[1]))
    several = torch.func.vmap(by_freq)(torch.stack((leaves[0], shifted[0])))
    for got, wanted in zip((*found, several[0]), (*want[0], want[0][0]), strict=True):
        torch.testing.assert_close(got, wanted)


def test_gradients_of_frequencies_have_none_of_their_own():
    """They say so, in place of a zero."""
    loss, leaves = losses(*qkv())
    leaves = [x.requires_grad_() for x in leaves]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for found in first:
        with pytest.raises(NotImplementedError, match="attention: the fused kernels have first"):
            torch.autograd.grad(found.square().sum(), leaves, retain_graph=True)


@pytest.mark.thorough
def test_divisors_are_learned_in_a_graph():
    """A score that is made anew in every step is part of the graph."""
    loss, leaves = losses(*qkv())
    leaves = [x.requires_grad_() for x in leaves]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(*leaves), leaves)
    for got, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(got, wanted)
    whole = torch.compile(backend="eager", fullgraph=True)  # of a backward alone
    with torch._dynamo.compiled_autograd._enable(whole):
        loss(*leaves).backward()
    for leaf, wanted in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, wanted)


# -------------------------------------------------------------------------------------------------
# Positions of several axes


AXES = torch.tensor([0, 1, 2, 0, 1] * 2 + [0] * 4, dtype=torch.int32)


def by_axes(seqlen: int) -> Tensor:
    """Text, an image of 2 x 3 patches, and text again, as mRoPE counts them: (3, 2, seqlen)."""
    image = [[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]]
    rows = torch.tensor([[*range(4), *axis, *range(7, 7 + seqlen - 10)] for axis in image])
    return torch.stack((rows, rows + torch.tensor([[0], [1], [2]])), 1).to(device())


@pytest.mark.parametrize("name", ["no score", "groups", "factors", "rerope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_of_axes(name, dtype, any_backend):
    """Regions count tokens, and distances are those of the pair's own axis."""
    if any_backend == "flash_attn":
        pytest.skip("the composition rotates by one position a token")
    q, k, v = qkv(dtype, seqlen_q=13, seqlen_k=19)
    freqs = methods.rope(2 * PAIRS).to(q.device)
    made = {"no score": lambda: None, "rerope": lambda: scores.rerope(6)}
    score = made.get(name, lambda: example(name).score)()
    places = by_axes(19)[AXES.long()].double().cpu().permute(1, 2, 0)  # (batch, seqlen, pairs)
    i, j = places[:, None, 6:, None], places[:, None, None]  # (batch, 1, rows, 1, pairs)
    if score is None:
        seen = i - j
    else:
        far = score.regions[0]
        tokens = torch.arange(6, 19)[:, None] - torch.arange(19)[None]
        if name == "rerope":
            apart = torch.full_like(i - j, 6.0)
        else:
            apart = _of_pair(far.q_map, i) - _of_pair(far.k_map, j)
        seen = torch.where((tokens < 6)[..., None], i - j, apart)
    one = Example(score, None, freqs)
    options = {"positions": by_axes(19), "backend": any_backend}
    given = dataclasses.replace(freqs, axes=AXES.to(q.device), attention_factor=1.0)
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def run(backend):
        out = rope_attention(*tensors, given, score, **{**options, "backend": backend})
        return out, torch.autograd.grad((out * dout).sum(), tensors)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = oracle(*wide, one, seen=seen)
    grads = torch.autograd.grad((exact * dout.double()).sum(), wide)
    (out, found), (same, low) = run(any_backend), run("reference")
    assert_within_budget("out", out, same, exact)
    _, lse = oracle_and_lse(*wide, one, seen=seen)
    for name, got, near, want in zip(("dq", "dk", "dv"), found, low, grads, strict=True):
        noise = truncation(any_backend, q, near, want)
        if dtype == torch.float32:
            noise += rounding_noise(name, want, lse, dout, q, k, v, q.shape[-1] ** -0.5)
        assert_within_budget(name, got, near, want, noise=noise)


def test_gradients_of_divisors_with_axes(any_backend):
    """As the slope between two values in float64."""
    if any_backend == "flash_attn":
        pytest.skip("the composition rotates by one position a token")
    tensors = qkv(seqlen_q=13, seqlen_k=19)
    freqs = dataclasses.replace(example("groups").freqs, axes=AXES.to(tensors[0].device))
    factors = (0.5 + 8 * drawn(PAIRS)).to(tensors[0].device)

    def loss(factors, dtype, backend):
        q, k, v = (x.to(dtype) for x in tensors)
        given = {"positions": by_axes(19), "backend": backend}
        return rope_attention(q, k, v, freqs, stretched(6, factors), **given).square().sum()

    def found(dtype, backend):
        leaf = factors.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, dtype, backend), leaf)[0]

    exact, step = found(torch.float64, "reference"), torch.zeros_like(factors)
    step[5] = 1e-6
    ends = [loss(factors + sign * step, torch.float64, "reference") for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, exact[5], rtol=1e-5, atol=1e-7)
    low = found(torch.float32, "reference")
    noise = 1e-5 * exact.abs().max().item()
    assert_within_budget("divisor", found(torch.float32, any_backend), low, exact, noise=noise)


def _of_pair(by: PairMap, positions: Tensor) -> Tensor:
    """Positions (..., pairs), each by its own pair's numbers."""
    p = positions / by.divisor
    return (p.floor() if by.floor else p) + by.offset


OPTIONS = {
    "window": {"sliding_window": 9},
    "log_n": {"log_n": 4},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "query_scale": {"query_scale": torch.linspace(0.5, 1.5, 13)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["no score", "groups"])
def test_axes_that_agree_are_one(name, option, any_backend):
    """With the token's own index on every axis all options are those of one axis, in float64."""
    if any_backend == "flash_attn":
        pytest.skip("the composition rotates by one position a token")
    dtype = torch.float64 if any_backend == "reference" else torch.float32
    q, k, v = qkv(dtype, seqlen_q=13, seqlen_k=19)
    freqs = methods.rope(2 * PAIRS).to(q.device)
    score = None if name == "no score" else example(name).score
    options = {key: x.to(q.device) if isinstance(x, Tensor) else x
               for key, x in OPTIONS[option].items()}  # fmt: skip
    if option == "sinks":
        options["sinks"] = options["sinks"].to(dtype)
    options |= {"backend": any_backend, "return_lse": True}
    want = rope_attention(q, k, v, freqs, score, **options)
    positions = torch.arange(19, device=q.device).expand(3, 1, 19)
    by_axis = dataclasses.replace(freqs, axes=AXES.to(q.device))
    found = rope_attention(q, k, v, by_axis, score, positions=positions, **options)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 3e-6}
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (0, 0), (1, 1)])
def test_axes_without_tokens(seqlen_q, seqlen_k, any_backend):
    """No query, no key, or one of each."""
    if any_backend == "flash_attn":
        pytest.skip("the composition rotates by one position a token")
    q, k, v = (x[:, :n] for x, n in zip(qkv(), (seqlen_q, seqlen_k, seqlen_k), strict=True))
    freqs = methods.rope(2 * PAIRS).to(q.device)
    options = {"backend": any_backend, "return_lse": True}
    want = rope_attention(q, k, v, freqs, scores.rerope(2), **options)
    positions = torch.arange(seqlen_k, device=q.device).expand(3, 1, seqlen_k)
    by_axis = dataclasses.replace(freqs, axes=AXES.to(q.device))
    found = rope_attention(q, k, v, by_axis, scores.rerope(2), positions=positions, **options)
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-6)


def test_axes_refuse_queries_without_positions():
    q, k, v = qkv(seqlen_k=12)
    freqs = dataclasses.replace(methods.rope(2 * PAIRS).to(q.device), axes=AXES.to(q.device))
    with pytest.raises(
        ValueError, match=r"q must have at most k's 12 tokens with positions of .* got 19"
    ):
        rope_attention(q, k, v, freqs, positions=by_axes(12))


@pytest.mark.parametrize(
    ("axes", "positions", "message"),
    [
        (AXES, by_axes(19)[:2], "axes must be from 0 to 1 for positions of 2 axes"),
        (AXES - 1, by_axes(19), "axes must be from 0 to 2 .*, got .-1, 0"),
    ],
)
def test_axes_are_rows_of_positions(axes, positions, message):
    q, k, v = qkv()
    freqs = dataclasses.replace(methods.rope(2 * PAIRS).to(q.device), axes=axes.to(q.device))
    with pytest.raises(ValueError, match=f"^rope_attention: {message}"):
        rope_attention(q, k, v, freqs, positions=positions)


def test_axes_refuse_frequencies_of_heads():
    q, k, v = qkv()
    freqs = dataclasses.replace(example("heads", 2).freqs, axes=AXES.to(q.device))
    with pytest.raises(
        ValueError, match="rope_attention: frequencies and maps must be the same for all heads"
    ):
        rope_attention(q, k, v, freqs, positions=by_axes(19))


def test_axes_without_a_key_in_sight():
    freqs = dataclasses.replace(methods.rope(2 * PAIRS), axes=AXES).to(device())
    q, k, v = (torch.randn(1, 3, n, 32, device=device()) for n in (2, 1, 1))
    score = Score("none", (Region(1, PositionMap(), PositionMap()),))
    places = torch.zeros(int(AXES.max()) + 1, 1, 3, device=device())
    out, lse = rope_attention(q, k, v, freqs, score, positions=places, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
