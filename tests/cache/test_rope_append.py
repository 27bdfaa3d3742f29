"""The fused step into a cache, against the rotation and an indexed write, each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.append_cases import CONTIGUOUS, FILLER, Step, ints

from extrope_kernels import (
    RopeFreqs,
    apply_rope,
    methods,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.methods import xpos
from extrope_kernels.ops.cache import reference as append_reference
from extrope_kernels.scores import FIRST_KEY, PositionMap, Region, Score
from extrope_kernels.testing import DTYPES, assert_within_budget, available_backends, device


def behind(lengths: tuple[int, ...], seqlen: int) -> list[tuple[int, int, int, int]]:
    return [(b, t, b, n + t) for b, n in enumerate(lengths) for t in range(seqlen)]


# Where CONTIGUOUS writes, and which positions these are.
SLOTS = behind((3, 9), 5)
POSITIONS = torch.stack([torch.arange(3, 8), torch.arange(9, 14)]).to(device())


# -------------------------------------------------------------------------------------------------
# Every way to say where keys go, what they are and how they rotate: one row a call


def row(*, slots=SLOTS, positions=POSITIONS, freqs=None, **step) -> tuple:
    """A Step; slots: (batch, token, block, place) that are written; positions: of the tokens."""
    step["call"] = step.get("call", CONTIGUOUS) | ({} if freqs is None else {"freqs": freqs})
    return step, slots, positions, freqs


def dims(head_dim: int, head_dim_v: int, rotary_dim: int, rotary_offset: int, **by) -> tuple:
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "rotary_dim": rotary_dim}
    return row(**sizes, call={**CONTIGUOUS, "rotary_offset": rotary_offset, **by})


def paged(page_size: int) -> tuple:
    blocks = 48 // page_size
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int().view(2, -1)
    slots = [(b, t, int(table[b, n // page_size]), n % page_size) for b, t, _, n in SLOTS]
    call = {"cache_seqlens": ints(3, 9), "block_table": table.to(device())}
    return row(blocks=(blocks, page_size), call=call, slots=slots)


def in_slots(slots: torch.Tensor, capacity: int, **step) -> tuple:
    """By a slot of each token, -1 for none."""
    rows = slots.view(-1, slots.shape[-1]).tolist()
    written = [(b, t, n // capacity, n % capacity)
               for b, row in enumerate(rows) for t, n in enumerate(row) if n >= 0]  # fmt: skip
    step["call"] = {"slot_mapping": slots, **step["call"]}
    return row(slots=written, **step)


# As serving engines: packed tokens, their positions, and padding that is written nowhere.
ENGINE = (17, -1, 4, 40, -1, 2, 11)
AT = ints(5, 0, 900, 3, 0, 2**24 - 1, 7, dtype=torch.int64)
BEHIND = ints(*range(20, 10, -1), dtype=torch.int64).view(5, 2).T  # of any stride
# What lies behind the last boundary is none.
PACKED = {"cache_seqlens": ints(2, 3, 8), "cu_seqlens": ints(0, 0, 4, 5, 9)[:-1]}
# As positions[:, -1] of a batch of one: to PyTorch they are contiguous.
STRIDED = {"cache_seqlens": ints(4, 0, 0)[::3], "block_table": ints(1, 0, 2).view(1, 3)[:, ::3],
           "cache_leftpad": ints(1, 0)[::2]}  # fmt: skip
SHIFTED = torch.stack([torch.arange(1, 6), torch.arange(4, 9)]).to(device())
OF_ROWS = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).to(device())
XPOS = methods.xpos(32).log_decay.to(device())
STEPS = {
    **{f"{dtype}": row(dtype=dtype) for dtype in DTYPES},
    "9 dims": dims(9, 5, 8, 1),
    "34 dims": dims(34, 64, 6, 0, interleaved=True),
    "72 dims": dims(72, 40, 72, 0),
    "128 dims": dims(128, 128, 64, 64, interleaved=True),
    "80 dims": dims(80, 80, 32, 24),
    "pages of a slot": paged(1),
    "pages of four": paged(4),
    **{f"slots in {dtype}": in_slots(ints(*ENGINE, dtype=dtype), 7, blocks=(6, 7), tokens=(7,),
                                     positions=AT, call={"positions": AT})
       for dtype in (torch.int32, torch.int64)},
    # Tokens without boundaries are one sequence: the tokens before them may be one int.
    "one length": in_slots(ints(*range(7, 14)), 23, tokens=(7,), call={"cache_seqlens": 5},
                           positions=ints(*range(5, 12))),
    "slots and positions": in_slots(BEHIND, 23, call={"positions": POSITIONS}),
    "slots and lengths": in_slots(BEHIND, 23, call={"cache_seqlens": ints(3, 9)}),
    "strided integers": row(blocks=(3, 9), tokens=(1, 5), call=STRIDED,
                            positions=ints(3, 4, 5, 6, 7),
                            slots=[(0, t, 1, 4 + t) for t in range(5)]),
    # Sequences of no token, of four and of one; two tokens belong to none, and count on.
    "packed": row(blocks=(3, 9), tokens=(7,), call=PACKED,
                  slots=[*((0, t, 1, 3 + t) for t in range(4)), (0, 4, 2, 8)],
                  positions=ints(3, 4, 5, 6, 8, 9, 10)),
    "left padding": row(call={**CONTIGUOUS, "cache_leftpad": ints(2, 5)}, positions=SHIFTED),
    "positions": row(call={**CONTIGUOUS, "positions": SHIFTED}, positions=SHIFTED),
    "xpos of each sequence": row(freqs=RopeFreqs(OF_ROWS, log_decay=XPOS)),
    "an origin": row(freqs=RopeFreqs(OF_ROWS[0], log_decay=20 * XPOS, decay_origin=7.5)),
}  # fmt: skip


# By decay_sign alone queries and keys differ.
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.always) if x == "an origin" else x for x in STEPS],
)
def test_where_what_and_how(backend, name):
    given, slots, positions, freqs = STEPS[name]
    step = Step(**given)
    step.freqs = step.freqs if freqs is None else freqs
    step.check(backend, step.expected(slots, positions))


def test_without_a_rotation(backend):
    """All dims are copied, whatever is said of positions and of the dims that would rotate."""
    unread = {"positions": ints(*range(4)).view(4, 1, 1), "rotary_offset": 8}
    for given in ({}, unread):
        step = Step(call={**CONTIGUOUS, "freqs": None, **given})
        step.freqs = RopeFreqs(torch.zeros(12, device=device()))
        step.check(backend, step.expected(SLOTS, ints(*range(5))))


# Triton too, wherever it is interpreted: no other packed step of its is always in the sample.
@pytest.mark.parametrize("each", [name for name in available_backends() if name != "reference"])
def test_packed_sequences_in_pages_behind_padding(each):
    """Each with frequencies of its own; one token belongs to none, and counts on."""
    table = ints(5, 2, 7, 1, 0, 6).view(2, 3)
    call = {"cu_seqlens": ints(0, 2, 6, 9)[:-1], "cache_seqlens": ints(3, 6), "block_table": table}
    step = Step(blocks=(8, 4), tokens=(7,), call=call | {"cache_leftpad": ints(1, 4)})
    rates, step.freqs = step.freqs.inv_freq, replace(step.freqs, attention_factor=1.0)
    places = [(0, 3), (0, 4), (1, 6), (1, 7), (1, 8), (1, 9)]
    slots = [(0, t, int(table[b, n // 4]), n % 4) for t, (b, n) in enumerate(places)]
    # A third of the frequency is a third of the position.
    at = [n - 1 if b == 0 else (n - 4) / 3 for b, n in [*places, (1, 10)]]
    expected = step.expected(slots, torch.tensor(at, dtype=torch.float64, device=device()))
    step.freqs = replace(step.freqs, inv_freq=torch.stack([rates, rates / 3]))
    step.check(each, expected)


SCORES = (
    scores.rerope(4),
    scores.leaky_rerope(4, 2.5),
    scores.self_extend(4, 2),
    scores.dual_chunk(9, 2),
)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
@pytest.mark.parametrize("given", (False, True))
def test_score_methods_store_keys_in_their_frame(backend, score, given):
    """As the attention with a cache writes them; q is not rotated."""
    call = {**CONTIGUOUS, "score": score, **({"positions": POSITIONS} if given else {})}
    step = Step(call=call)
    expected = step.expected(SLOTS, score.stored(POSITIONS))
    k = expected[1] != FILLER
    expected[1][k] /= 1.1  # the attention factor is the attention's
    expected[0] = step.q.double()
    step.check(backend, expected)


@pytest.mark.parametrize("first", (0, 2**29 - 40))
@pytest.mark.parametrize(
    "by",
    (
        PositionMap(modulus=7, offset=3),
        PositionMap(modulus=11, divisor=2.0, floor=True, offset=3, cap=4),
        PositionMap(divisor=3.0, floor=True, offset=-5.25),
        PositionMap(modulus=6, divisor=0.7, offset=-2),
    ),
    ids=repr,
)
def test_attention_maps_positions_as_append_does(by, first, any_backend):
    """Keys that append has mapped, in float64, are those that attention maps, in integers."""
    q, k, v = torch.randn(3, 1, 21, 2, 32, device=device())
    freqs = methods.rope(32).to(device())
    score = Score("mapped", (Region(FIRST_KEY, PositionMap(), by),), stored=by)
    kept, at = torch.zeros_like(k), torch.arange(21, device=device())[None] + first
    given = {"score": score, "cache_seqlens": 0, "positions": at, "backend": any_backend}
    rope_append_kvcache(q, k, v, kept, torch.zeros_like(v), freqs, **given)
    given = {"q_start": first, "k_start": first, "backend": any_backend}
    raw = rope_attention(q, k, v, freqs, score, **given)
    stored = rope_attention(q, kept, v, freqs, score, rotated="k", **given)
    torch.testing.assert_close(stored, raw, atol=2e-6, rtol=0)


def test_xpos_in_blocks(backend):
    freqs = methods.xpos(32).to(device())
    step = Step(call={**CONTIGUOUS, "score": scores.blockwise_causal(16), "freqs": freqs})
    got, exact = step.run(backend), step.run("reference", torch.float64)
    same = step.run("reference")
    assert_within_budget("k_cache", got[1], same[1], exact[1])
    assert torch.equal(got[0], step.q)


def test_without_queries(backend):
    step = Step(call=CONTIGUOUS)
    expected = step.run(backend)
    caches = step.caches(torch.float32)
    call = {"freqs": step.freqs, **step.call, "backend": backend}
    assert rope_append_kvcache(None, step.k, step.v, *caches, **call) is None
    assert torch.equal(caches[0], expected[1]) and torch.equal(caches[1], expected[2])


@pytest.mark.skipif(device() == "cuda", reason="the values of tables on the device are not read")
def test_pages_of_new_tokens_must_exist(backend):
    """Those before them may be gone: nothing reads them."""
    sizes, call = {"tokens": (2, 2), "blocks": (8, 4)}, {"cache_seqlens": ints(5, 5)}
    Step(**sizes, call=call | {"block_table": ints(99, 2, 99, 3).view(2, 2)}).run(backend)
    gone = Step(**sizes, call=call | {"block_table": ints(0, 2, 1, 99).view(2, 2)})
    with pytest.raises(ValueError, match="block_table must name pages between 0 and 7"):
        gone.run(backend)


@pytest.mark.parametrize("tokens", ((2, 0), (0, 5)))
def test_nothing_to_write(backend, tokens):
    lengths = ints(3, 9)[: tokens[0]]
    step = Step(tokens=tokens, blocks=(tokens[0], 23), call={"cache_seqlens": lengths})
    q, k_cache, v_cache = step.run(backend)
    assert q.shape == step.q.shape and (k_cache == FILLER).all() and (v_cache == FILLER).all()


def test_more_tokens_than_one_program_and_thread(backend):
    """Across pages, from a cache whose heads lie before its slots."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(80, generator=generator).int().view(2, 40).to(device())
    call = {"cache_seqlens": ints(1, 30), "block_table": table}
    tokens = (2, 260 if backend == "triton" and device() == "cpu" else 600)
    step = Step(blocks=(80, 16), tokens=tokens, dtype=torch.float16, call=call)
    got, expected = step.run(backend), step.run("reference")
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=2**-10, atol=2**-10)
    caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in step.caches(step.dtype)]
    qkv = step.q, step.k, step.v
    rope_append_kvcache(*qkv, *caches, step.freqs, backend=backend, **call)
    assert torch.equal(caches[0], got[1]) and torch.equal(caches[1], got[2])


def test_autograd_notices_what_is_appended(backend):
    """To a cache that it has saved."""
    step = Step()
    caches = step.caches(step.dtype)
    weight = torch.ones((), device=device(), requires_grad=True)
    loss = sum((weight * x).sum() for x in caches)
    rope_append_kvcache(step.q, step.k, step.v, *caches, step.freqs, backend=backend, **CONTIGUOUS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -------------------------------------------------------------------------------------------------
# Options that change numbers, and places that come together


@pytest.mark.parametrize("name", ("q", "k", "v"))
@pytest.mark.parametrize("cache_name", ("k_cache", "v_cache"))
def test_rows_that_are_read_lie_beside_those_that_are_written(name, cache_name):
    """Where both are slots of one cache, a thread would read what another has written."""
    caches = {x: torch.randn(2, 64, 2, 32) for x in ("k_cache", "v_cache")}
    new = {x: torch.randn(2, 20, 2, 32) for x in ("q", "k", "v")}
    options = {"cache_seqlens": 3, "backend": "cpu"}
    for first in (0, 22, 23, 44):  # 3 to 22 are written
        expected = {x: cache.clone() for x, cache in caches.items()}
        given = {**new, name: expected[cache_name][:, first : first + 20]}
        copied = {**new, name: given[name].clone()}
        actual = {x: cache.clone() for x, cache in expected.items()}
        rope_append_kvcache(**copied, **actual, freqs=methods.rope(32), **options)
        if first < 23:
            refused = (
                f"^rope_append_kvcache: {name} must not share memory with {cache_name}'s slots"
            )
            with pytest.raises(ValueError, match=refused):
                rope_append_kvcache(**given, **expected, freqs=methods.rope(32), **options)
            actual = caches
        else:
            rope_append_kvcache(**given, **expected, freqs=methods.rope(32), **options)
        for x in caches:
            torch.testing.assert_close(expected[x], actual[x], rtol=0, atol=0)


def test_frequencies_of_each_head(backend):
    step = Step(call=CONTIGUOUS)
    freqs = methods.ms_poe(methods.rope(32), heads=2).to(device())
    caches = step.caches(torch.float32)
    rope_append_kvcache(None, step.k, step.v, *caches, freqs, backend=backend, **CONTIGUOUS)
    call = {"positions": POSITIONS, "backend": "reference"}
    expected = apply_rope(step.k.double(), freqs, **call).float()
    for batch, token, block, place in SLOTS:
        torch.testing.assert_close(caches[0][block, place], expected[batch, token])
    assert (caches[0] == FILLER).all(-1).sum() == (2 * 23 - len(SLOTS)) * 2


# -------------------------------------------------------------------------------------------------
# Keys that XPOS takes out of their dtype's range are not written


REACH = 4532  # of float16


TOKENS = 4


def append(last: int, freqs=None, **options):
    """Of tokens whose last one is at position `last`."""
    x = torch.full((1, TOKENS, 1, 8), 0.5, dtype=torch.float16, device=device())
    cache = torch.zeros(1, last + 3, 1, 8, dtype=x.dtype, device=x.device)
    options.setdefault("cache_seqlens", last + 1 - TOKENS)
    rope_append_kvcache(None, x, x, cache, cache.clone(), freqs or xpos(8).to(device()), **options)
    return cache


def attend(last: int, block_size: int):
    x = torch.full((1, TOKENS, 1, 8), 0.5, dtype=torch.float16, device=device())
    cache = torch.zeros(1, last + 3, 1, 8, dtype=x.dtype, device=x.device)
    lengths = {"cache_seqlens": last + 1 - TOKENS}
    freqs, score = xpos(8).to(device()), scores.blockwise_causal(block_size)
    return rope_attention_with_kvcache(x, cache, cache.clone(), freqs, score, **lengths, k=x, v=x)


@pytest.mark.parametrize(
    "write",
    [
        append,
        lambda last: append(last, score=scores.blockwise_causal(20_000)),
        lambda last: append(last, positions=torch.arange(last + 1 - TOKENS, last + 1)),
        lambda last: append(
            last + 2, cache_leftpad=torch.tensor([2], dtype=torch.int32), cache_seqlens=last - 1
        ),
        lambda last: attend(last, 20_000),
    ],
)
def test_the_last_position_within_the_range(write):
    if device() == "cuda":
        pytest.skip("lengths on the device are not read back")
    assert write(REACH).isfinite().all()
    with pytest.raises(ValueError, match=rf"within {REACH} .*float16, .* to {REACH + 1}$"):
        write(REACH + 1)


def test_an_origin_and_blocks_keep_them_near():
    far = append(2 * REACH, xpos(8, decay_origin=REACH).to(device()))
    assert far.isfinite().all() and far.any()
    assert append(2 * REACH, score=scores.blockwise_causal(64)).isfinite().all()
    assert attend(2 * REACH, 64).isfinite().all()


def test_the_reference_skips_what_is_outside_of_the_cache(monkeypatch):
    """As kernels do on a GPU, where values are not checked before."""
    monkeypatch.setattr(append_reference, "check_values", lambda op, call: None)
    step = Step(blocks=(12, 4))
    table = ints(1, 12, -1, 4).view(2, 2)
    places = (
        {"cache_seqlens": ints(-9, 8), "block_table": table},
        {"cache_seqlens": ints(3, 4), "block_table": table - 13},
        {"slot_mapping": ints(*range(48, 58)).view(2, 5), "positions": ints(*range(5))},
    )
    for call in places:
        caches = step.caches(torch.float32)
        rope_append_kvcache(
            step.q, step.k, step.v, *caches, step.freqs, **call, backend="reference"
        )
        assert all((x == FILLER).all() for x in caches)


@pytest.mark.parametrize("position", (0, 5))
def test_the_raw_op_scales_keys_at_one_position_too(any_backend, position):
    step = Step()
    op = append_reference.rope_append
    if any_backend != "reference":
        op = getattr(
            torch.ops.extrope, "rope_append" + ("_triton" if any_backend == "triton" else "")
        )
    caches = step.caches(torch.float32)
    lengths, inv_freq = CONTIGUOUS["cache_seqlens"], step.freqs.inv_freq
    stored = {"map_kinds": [4], "map_offsets": [float(position)], "attention_factor": 1.4}
    op(None, step.k, step.v, *caches, inv_freq, lengths, **stored)
    freqs = replace(step.freqs, attention_factor=1.4)
    exact = apply_rope(
        step.k.double(), freqs, positions=torch.full((5,), position, device=device())
    )
    at = tuple(torch.tensor(SLOTS, device=device())[:, 2:].T)
    torch.testing.assert_close(caches[0][at].double(), exact.flatten(0, 1), rtol=1e-6, atol=1e-6)
