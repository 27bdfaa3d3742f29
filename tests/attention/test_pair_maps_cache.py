"""Maps of pairs and frequencies of heads over every kind of cache, and calls that are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_oracle import make_qkv, rounding_noise, split, truncation
from test_pair_maps import PAIRS, Example, drawn, example, stretched
from torch import Tensor

from extrope_kernels import (
    RopeFreqs,
    methods,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.ops.attention import make_call
from extrope_kernels.testing import assert_within_budget, device

DTYPES = (torch.float32, torch.bfloat16)
FP8 = torch.float8_e4m3fn
LENGTHS, CAPACITY, PAGE = (150, 137), 160, 16
KINDS = ("padded pages", "packed", "fp8", "raw")
SCALES = (
    0.03125,
    0.0625,
)  # of the heads of a cache in fp8; powers of two, so that 16 bits are exact
MADE = [("groups", 2), ("turned back", 2), ("heads and factors", 2)]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device())


def rows_of(call: dict, b: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Where so many tokens of a sequence from position `first` on lie in the cache."""
    pad = call["cache_leftpad"][b] if "cache_leftpad" in call else 0
    slots = torch.arange(first, first + count, device=device()) + pad
    if "block_table" not in call:
        return torch.full_like(slots, b), slots
    return call["block_table"][b].long()[slots // PAGE], slots % PAGE


def make_cache(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
    """Keys and values as if they were stored, and what a call says of the cache."""
    call: dict = {"stored": "raw"} if kind == "raw" else {}
    shape = (2, CAPACITY)
    if kind == "padded pages":
        call["cache_leftpad"] = ints(3, 0)
        order = torch.randperm(2 * CAPACITY // PAGE, generator=torch.Generator().manual_seed(2))
        call["block_table"] = order.int().view(2, -1).to(device())
        shape = (2 * CAPACITY // PAGE, PAGE)
    cache_dtype = torch.float32 if kind == "fp8" else dtype
    _, k, v = make_qkv(shape[0], 1, shape[1], 4, 2, 32, cache_dtype)
    if kind == "fp8":
        scales = torch.tensor(SCALES, device=device())
        call |= {"k_scale": scales, "v_scale": scales}
        k, v = ((x / scales[:, None]).to(FP8) for x in (k, v))
    return k, v, call


def dequantized(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != FP8:
        return x.to(dtype)
    return (x.float() * torch.tensor(SCALES, device=x.device)[:, None]).to(dtype)


def of_sequence(one: Example, b: int) -> RopeFreqs:
    return dataclasses.replace(one.freqs, inv_freq=one.freqs.inv_freq[b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [3, 130], ids=["few", "chunk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "heads"), MADE)
def test_reading(name, heads, kind, seqlen_q, dtype, any_backend):
    """As attention over the same keys, which come as the cache has them."""
    one = example(name, heads, 2)
    k_cache, v_cache, call = make_cache(kind, dtype)
    q = make_qkv(2, seqlen_q, 1, 4, 2, 32, dtype)[0]
    call["cache_seqlens"] = ints(*LENGTHS)
    if "cache_leftpad" in call:
        call["cache_seqlens"] += call["cache_leftpad"]
    new = [seqlen_q, seqlen_q]
    if kind == "packed":
        new = [seqlen_q, 1]
        call["cu_seqlens_q"] = ints(0, seqlen_q, seqlen_q + 1)
        q = torch.cat((q[0], q[1, -1:]))
    given = {"freqs": one.freqs, "score": one.score, "backend": any_backend}
    out = rope_attention_with_kvcache(q, k_cache, v_cache, **given, **call)
    begin = 0
    for b, (length, count) in enumerate(zip(LENGTHS, new)):
        rows = rows_of(call, b, 0, length)
        of_q = q[None, begin : begin + count] if kind == "packed" else q[b : b + 1]
        got = out[None, begin : begin + count] if kind == "packed" else out[b : b + 1]
        begin += count
        (same, _), (exact, lse) = (
            rope_attention(
                of_q.to(wide), *(dequantized(x, wide)[rows][None] for x in (k_cache, v_cache)),
                of_sequence(one, b), one.score, keys_stored=kind != "raw", return_lse=True,
                backend="reference",
            )
            for wide in (dtype, torch.float64)
        )  # fmt: skip
        noise = truncation(any_backend, of_q, same, exact)
        if dtype == torch.float32:
            noise += rounding_noise("dv", exact, lse, None, of_q, of_q, of_q, 1.0)
        assert_within_budget("out", got, same, exact, noise=noise)


def stored_keys(k: Tensor, one: Example, b: int, first: int, raw: bool) -> Tensor:
    """Raw keys (tokens, heads_k, 32) of a sequence in float64, where the score stores them."""
    if raw:
        return k.double()
    j = torch.arange(first, first + len(k), dtype=torch.float64)
    stored = one.score.stored(j)
    places = stored.view(len(k), -1, PAIRS if stored.dim() > 1 else 1).to(k.device)
    angle = places * one.freqs.inv_freq[b].double()
    x, y, rest = split(k.double(), PAIRS, interleaved=False)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((x * cos - y * sin, y * cos + x * sin, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "heads"), MADE[::2])
def test_writing(name, heads, kind, dtype, any_backend):
    """New keys go where the score stores them, by pair and head; the other slots stay."""
    one = example(name, heads, 2)
    k_cache, v_cache, call = make_cache(kind, dtype)
    before = k_cache.clone()
    q, k, v = make_qkv(2, 5, 5, 4, 2, 32, dtype)
    firsts, new = (90, 7), [5, 5]
    call["cache_seqlens"] = ints(*firsts)
    if "cache_leftpad" in call:
        call["cache_seqlens"] += call["cache_leftpad"]
    if kind == "packed":
        new = [5, 2]
        call["cu_seqlens_q"] = ints(0, 5, 7)
        q, k, v = (x.flatten(0, 1)[:7] for x in (q, k, v))
    given = {"freqs": one.freqs, "score": one.score, "backend": any_backend}
    rope_attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, **given, **call)
    for b, (first, count) in enumerate(zip(firsts, new)):
        rows = rows_of(call, b, first, count)
        of_b = (x[:5] if b == 0 else x[5:] for x in (k, v)) if kind == "packed" else (k[b], v[b])
        of_k, of_v = of_b
        want = stored_keys(of_k, one, b, first, kind == "raw")
        eps = 0.125 if kind == "fp8" else torch.finfo(dtype).eps
        error = (dequantized(k_cache, torch.float64)[rows] - want).abs()
        assert (error <= eps * want.abs().max()).all()
        if kind != "fp8":
            assert torch.equal(v_cache[rows], of_v)
        before[rows] = k_cache[rows]
    assert torch.equal(before.view(torch.uint8), k_cache.view(torch.uint8))


@pytest.mark.parametrize("kind", ("padded pages", "packed", "fp8"))
def test_append_writes_as_attention_does(kind, any_backend):
    one = example("groups", 1, 2)
    k_cache, v_cache, call = make_cache(kind, torch.float32)
    q, k, v = make_qkv(2, 5, 5, 4, 2, 32)
    call["cache_seqlens"] = ints(90, 7)
    new = dict(call)
    if kind == "packed":
        q, k, v = (x.flatten(0, 1)[:7] for x in (q, k, v))
        new["cu_seqlens"] = call["cu_seqlens_q"] = ints(0, 5, 7)
    given = {"freqs": one.freqs, "score": one.score, "backend": any_backend}
    found = [k_cache.clone(), v_cache.clone()]
    out = rope_append_kvcache(q, k, v, *found, **given, **new)
    assert torch.equal(out, q)
    rope_attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, **given, **call)
    for got, want in zip(found, (k_cache, v_cache)):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score", [stretched(6, 1 + drawn(PAIRS)), scores.string(6, 2)])
def test_append_takes_frequencies_of_heads(score, any_backend):
    """Those of k's heads: queries, which have more, are not rotated."""
    freqs = example("heads", 2).freqs
    q, k, v = make_qkv(2, 5, 5, 4, 2, 32)
    caches = torch.zeros(4, 2, 9, 2, 32, device=device()).unbind()
    given = {"freqs": freqs, "score": score, "cache_seqlens": 3, "backend": any_backend}
    assert torch.equal(rope_append_kvcache(q, k, v, *caches[:2], **given), q)
    rope_attention_with_kvcache(q, *caches[2:], k=k, v=v, **given)
    for got, want in zip(caches[:2], caches[2:]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_raw_cache_in_a_graph():
    one = example("factors", 2)
    q, k, v = make_qkv(2, 3, CAPACITY, 4, 2, 32)

    def step(q, k, v, cache_seqlens):
        given = {"cache_seqlens": cache_seqlens, "stored": "raw"}
        return rope_attention_with_kvcache(q, k, v, one.freqs, one.score, **given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, ints(*LENGTHS)), step(q, k, v, ints(*LENGTHS)))


def test_nothing_to_do(any_backend):
    one = example("groups", 2)
    for batch, seqlen_q, seqlen_k in ((0, 3, 3), (2, 0, 5), (2, 0, 0), (1, 4, 0)):
        q, k, v = (
            torch.zeros(batch, n, heads, 32, device=device(), requires_grad=True)
            for n, heads in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
        )
        out = rope_attention(q, k, v, one.freqs, one.score, backend=any_backend)
        assert out.shape == q.shape and not out.any()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert not any(x.any() for x in grads)
    for batch, seqlen_q in ((0, 1), (2, 0)):
        q = torch.zeros(batch, seqlen_q, 4, 32, device=device())
        cache = torch.zeros(batch, 8, 2, 32, device=device())
        given = {"cache_seqlens": 3, "backend": any_backend}
        out = rope_attention_with_kvcache(q, cache, cache, one.freqs, one.score, **given)
        assert out.shape == q.shape


def test_a_table_that_no_map_names(any_backend):
    """It changes nothing: regions without keys are left out, and their maps with them."""
    q, k, v = make_qkv(1, 9, 9, 4, 2, 32)
    freqs = example("groups").freqs
    call = make_call(freqs, None)
    table = make_call(freqs, stretched(6, 1 + drawn(2, PAIRS))).pair_maps
    name = {"reference": "attention_fwd", "cpu": "attention_fwd"}.get(any_backend)
    op = getattr(torch.ops.extrope, name or f"attention_fwd_{any_backend}")
    outs = [
        op(q, k, v, *call._replace(pair_maps=x).tensors, **call.options)[0] for x in (None, table)
    ]
    assert torch.equal(*outs)


FACTORS = 1 + drawn(2, PAIRS)
BAD = [
    ({"score": stretched(6, FACTORS[:, 1:])}, "maps of pairs must be of 14 pairs and 2 heads"),
    ({"score": stretched(6, FACTORS.repeat(2, 1)[:3])}, "maps of pairs must be of 14 pairs"),
    ({"freqs": methods.xpos(2 * PAIRS)}, "got maps of pairs"),
    ({"freqs": RopeFreqs(torch.ones(1, 3, PAIRS))}, "inv_freq must be"),
    ({"freqs": RopeFreqs(torch.ones(3, 2, PAIRS))}, "inv_freq must be"),
    ({"freqs": RopeFreqs(torch.ones(1, 1, 2, PAIRS))}, "inv_freq must be"),
]  # fmt: skip


def test_a_cache_refuses_axes():
    """It takes no positions that could be given with them."""
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    freqs = methods.with_sections(methods.rope(2 * PAIRS), [4, 5, 5]).to(device())
    with pytest.raises(ValueError, match=r"kvcache: freqs must have no axes \(mRoPE\), got some"):
        rope_attention_with_kvcache(q, k, v, freqs, cache_seqlens=9)


def test_frequencies_that_are_no_tensor_are_refused():
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    call = {"freqs": RopeFreqs([1.0] * PAIRS), "score": stretched(6, FACTORS)}
    with pytest.raises(TypeError, match=r"^stretched: inv_freq must be a Tensor, got list"):
        rope_attention(q, k, v, **call)
    with pytest.raises(TypeError, match=r"^stretched: inv_freq must be a Tensor, got list"):
        rope_attention_with_kvcache(q, k, v, **call, cache_seqlens=9)


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_refused(changes, message, any_backend):
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    call = {"freqs": example("groups").freqs, "score": stretched(6, FACTORS), **changes}
    call["freqs"] = call["freqs"].to(device())
    with pytest.raises(ValueError, match=f"^stretched: .*{message}"):
        rope_attention(q, k, v, **call, backend=any_backend)
    if call["freqs"].log_decay is None:
        with pytest.raises(ValueError, match=f"^stretched: .*{message}"):
            rope_attention_with_kvcache(q, k, v, **call, cache_seqlens=9, backend=any_backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": -1.0}, "softcap must be >= 0"),
        ({"sinks": torch.zeros(3)}, r"sinks must be torch.float32 \(4,\)"),
        ({"sinks": torch.zeros(())}, r"sinks must be torch.float32 \(4,\)"),
        ({"query_scale": torch.ones(3)}, r"query_scale must be float32 \(9,\)"),
        ({"backend": "nothing"}, "backend must be None or one of"),
        ({"keys_stored": True}, "keys_stored must be False with frequencies of each head of q"),
    ],
)
def test_frequencies_of_each_query_head_are_not_blamed(options, message):
    """Each member of the groups is a call: its frequencies are as they should be."""
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    options = {n: x.to(q.device) if isinstance(x, Tensor) else x for n, x in options.items()}
    for freqs, score in (
        (RopeFreqs(torch.ones(1, 4, PAIRS, device=q.device)), stretched(6, FACTORS)),
        (example("groups").freqs, stretched(6, FACTORS.repeat(2, 1))),
    ):
        with pytest.raises(ValueError, match=f"^stretched: {message}"):
            rope_attention(q, k, v, freqs, score, **options)


def test_the_op_refuses(any_backend):
    """What the public functions never make: no table, another dtype, rows that are not there."""
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    call = make_call(example("groups").freqs, stretched(6, FACTORS))
    suffix = f"_{any_backend}" if any_backend == "triton" else ""
    op = getattr(torch.ops.extrope, f"attention_fwd{suffix}")
    table = call.pair_maps
    for wrong, message in (
        (None, "pair_maps"),
        (table[:1], "maps name row 1 of 1 in pair_maps"),
        (table.float(), "as float64"),
        (table[:, :1], "maps of pairs must be"),
        (table[0], "maps of pairs must be|maps name row"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            op(q, k, v, *call._replace(pair_maps=wrong).tensors, **call.options)


def test_append_refuses(any_backend):
    _, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    caches = torch.zeros(2, 2, 20, 2, 32, device=device()).unbind()
    freqs = example("groups").freqs
    given = {"cache_seqlens": 3, "backend": any_backend}
    for score in (stretched(6, FACTORS), stretched(6, FACTORS[0, 1:])):
        with pytest.raises(ValueError, match="must store keys by a map of 14 pairs, the same for"):
            rope_append_kvcache(None, k, v, *caches, freqs, score=score, **given)
    with pytest.raises(ValueError, match="no log_decay"):
        xpos = methods.xpos(2 * PAIRS).to(device())
        rope_append_kvcache(None, k, v, *caches, xpos, score=stretched(6, FACTORS[0]), **given)
    with pytest.raises(ValueError, match="positions must be whole numbers"):
        at = torch.ones(9, device=device())
        score = stretched(6, FACTORS[0])
        rope_append_kvcache(None, k, v, *caches, freqs, score=score, positions=at, **given)
    assert not torch.stack(caches).any()
