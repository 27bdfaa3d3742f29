"""What attention over a cache refuses beside one wrong argument; and nothing is written.

Single wrong arguments are in tests/all_ops/test_wrong_arguments.py.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from support.decode_oracle import Case, make
from support.rope_oracle import INTERPRETED

from extrope_kernels import methods, rope_attention_with_kvcache, scores
from extrope_kernels.ops.attention import make_call
from extrope_kernels.scores import PositionMap, Region, Score
from extrope_kernels.testing import device

DIM = 32


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=device())


def randn(*shape, **options):
    return torch.randn(*shape, device=device(), **options)


NEW = randn(2, 2, 2, DIM)


@pytest.mark.parametrize("named", [None, "reference"])
def test_pages_have_slots(named):
    cache = {name: randn(3, 0, 2, DIM) for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"^rerope: .* must have a block_size >= 1"):
        make(Case((9, 9), 2)).run(named, **cache, block_table=ints(0, 1)[:, None])


@pytest.mark.parametrize("boundaries", [(1, 3, 6), (0, 4, 3), (0, 3, 7)], ids=str)
@pytest.mark.parametrize("named", [None, "reference"])
def test_wrong_boundaries(boundaries, named):
    if not INTERPRETED:
        pytest.skip("values on a GPU are not looked at")
    inputs = make(Case((9, 9), counts=(3, 3)))
    message = (
        f"rerope: cu_seqlens_q must rise from 0 to q's 6 tokens at most, got {list(boundaries)}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        inputs.run(named, cu_seqlens_q=ints(*boundaries))


def test_another_word_than_raw():
    with pytest.raises(ValueError, match=r"rerope: stored must be None or 'raw', got 'raws'"):
        make(Case()).run(stored="raws")


@pytest.mark.parametrize("name", ("k", "v"))
def test_new_rows_are_not_slots_that_are_written(name):
    """A thread would read what another has written; other slots of the cache are fine."""
    k_cache, v_cache = torch.randn(2, 2, 12, 2, DIM)
    rest = {"freqs": methods.rope(DIM), "cache_seqlens": 3, "backend": "cpu"}
    rest |= {"q": torch.randn(2, 2, 4, DIM), "v_cache": v_cache, "k": NEW.cpu(), "v": NEW.cpu()}
    cache = {"k": k_cache, "v": v_cache}[name]
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(ValueError, match=f"kvcache: {name} must not share memory with {name}_ca"):
        rope_attention_with_kvcache(k_cache=k_cache, **{**rest, name: cache[:, 2:4]})
    for x, y in zip((k_cache, v_cache), before):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    new = cache[:, 5:7].clone()
    rope_attention_with_kvcache(k_cache=k_cache, **{**rest, name: cache[:, 5:7]})
    actual = k_cache.clone(), v_cache.clone()
    rope_attention_with_kvcache(k_cache=k_cache, **{**rest, name: new})
    for x, y in zip(actual, (k_cache, v_cache)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_head_dims_of_the_fused_kernels():
    inputs = make(Case((9, 9), head_dim=12, rotary_dim=12))
    with pytest.raises(ValueError, match=r"^rerope: head_dim must"):
        inputs.run()
    inputs.run("reference")


# -------------------------------------------------------------------------------------------------
# The op itself: what a call of torch.ops may get wrong, too

NAN = float("nan")


def grouped(kind=2, modulus=0, divisor=1.0, floor=False, offset=0.0, cap=0.0):
    """Six maps by columns: all of rerope(4), but that the first has these numbers."""
    return dict(
        map_kinds=[kind, 0, 0, 0, 4, 4], map_moduli=[modulus, *[0] * 5],
        map_divisors=[divisor, *[1.0] * 5], map_floors=[floor, *[False] * 5],
        map_offsets=[offset, *[0.0] * 5], map_caps=[cap, *[0.0] * 5],
    )  # fmt: skip


WRONG = {
    "no regions": (dict(region_starts=[]), "region_starts must be of 1 to 3 regions, got 0"),
    "a map alone": (dict(map_kinds=[0]), "map_kinds must be of 6 maps"),
    "no kind": (dict(map_kinds=[9] * 6), "map_kinds must be those of MapKind, got 9"),
    "a kind of other numbers": (
        dict(map_kinds=[0] * 6, map_divisors=[2.0] + [1.0] * 5),
        "map_divisors must be 1",
    ),
    "divisor 0": (grouped(divisor=0.0), "divisor >= 2"),
    "divisor nan": (grouped(divisor=NAN), "divisor >= 2"),
    "divisor 1e-20": (grouped(divisor=1e-20), "divisor >= 2"),
    "offset nan": (grouped(offset=NAN), "offset within 2"),
    "offset inf": (grouped(offset=math.inf), "offset within 2"),
    "offset 1e30": (grouped(offset=1e30), "offset within 2"),
    "modulus": (grouped(modulus=-1), "modulus must be a whole number >= 0"),
    "floor": (grouped(divisor=1.5, floor=True), "whole divisor"),
    "cap": (grouped(kind=3, cap=0.5), "whole numbers only"),
    "attention_factor": (dict(attention_factor=1e300), "attention_factor must be > 0"),
    "softmax_scale": (dict(softmax_scale=1e39), "softmax_scale must be > 0"),
    "sliding_window": (dict(sliding_window=2**62), "sliding_window must be < 2**62"),
    "k seqlen": (
        dict(k=NEW[:, :1], v=NEW[:, :1]),
        {"cpu": "k must have q's batch and seqlen", "triton": "k must be (batch 2, seqlen 2, "},
    ),
    "q alone rotated": (dict(map_kinds=[4, 4, 0, 0, 0, 4]), "q must come raw, or at its own"),
    "k alone": (dict(v=None), "k and v must be given together, got k alone"),
    "inv_freq": (dict(inv_freq=randn(DIM)), "inv_freq must"),
    "log_decay": (dict(log_decay=randn(3)), "log_decay "),
    "no room": (dict(cache_seqlens=ints(1, 11)), "2 new tokens included, got"),
}


def op_call(score=scores.rerope(4), **changes):  # noqa: B008
    call = make_call(methods.rope(DIM).to(device()), score, rotated="k")
    given = {
        "q": randn(2, 2, 4, DIM), "k_cache": randn(2, 12, 2, DIM),
        "v_cache": randn(2, 12, 2, DIM), "k": NEW, "v": NEW, "inv_freq": call.inv_freq,
        "cu_seqlens_q": None, "log_decay": None, "sinks": None, "query_scale": None,
        "pair_maps": None, "cache_seqlens": ints(3, 5), "block_table": None,
        "cache_leftpad": None, "k_scale": None, "v_scale": None, **call.options,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.always  # none gets as far as a kernel
@pytest.mark.parametrize("name", WRONG)
def test_the_op_refuses_before_it_writes(name, fast_backend):
    if not INTERPRETED and name == "no room":
        pytest.skip("values on a GPU are not looked at")
    changes, words = WRONG[name]
    given = op_call(**changes)
    before = {argument: given[argument].clone() for argument in ("k_cache", "v_cache")}
    op = torch.ops.extrope.decode_triton if fast_backend == "triton" else torch.ops.extrope.decode
    with pytest.raises((RuntimeError, ValueError)) as caught:
        op(**given)
    text, words = str(caught.value), words if type(words) is str else words[fast_backend]
    assert text.startswith(("decode: ", "attention: ")) and words in text, text
    assert all(torch.equal(given[argument], x) for argument, x in before.items())


def test_the_op_writes_to_no_cache_that_requires_grad(fast_backend):
    given = op_call()
    given["v_cache"].requires_grad_()
    op = torch.ops.extrope.decode_triton if fast_backend == "triton" else torch.ops.extrope.decode
    with pytest.raises(ValueError, match=r"^decode.*: must write to no tensor that requires grad"):
        op(**given)
    op(**given | {"k": None, "v": None})
    with torch.no_grad():
        op(**given)


# -------------------------------------------------------------------------------------------------
# XPOS: amplitudes of keys would have to change with the query


def test_no_op_rotates_decayed_keys_on(fast_backend):
    op = torch.ops.extrope.decode_triton if fast_backend == "triton" else torch.ops.extrope.decode
    with pytest.raises((RuntimeError, ValueError), match=r"decode.*: log_decay .* needs keys"):
        op(**op_call(log_decay=randn(16), k=None, v=None))


def decayed(score, backend, slots=12):
    """Append two tokens by XPOS at a score that stores keys by blocks; return out and the cache."""
    torch.manual_seed(0)
    cache = [randn(2, slots, 2, DIM) for _ in range(2)]
    freqs = methods.xpos(DIM).to(device())
    at = {"k": NEW, "v": NEW, "cache_seqlens": ints(3, 5), "backend": backend}
    before = [x.clone() for x in cache]
    try:
        return rope_attention_with_kvcache(randn(2, 2, 4, DIM), *cache, freqs, score, **at)
    except ValueError:
        assert all(torch.equal(x, y) for x, y in zip(cache, before))
        raise


def blocks(start, far):
    """Blockwise causal, whose far keys from `start` on are seen by another map."""
    within, previous = PositionMap(modulus=8), PositionMap(modulus=8, offset=8)
    regions = (Region(start, previous, far), Region(0, within, within))
    return Score("blocks", regions, granularity=8, stored=within)


@pytest.mark.parametrize("far", [PositionMap(), PositionMap(modulus=4)], ids=repr)
def test_decayed_keys_are_seen_as_they_are_stored(far, any_backend):
    message = r"^blocks: log_decay \(XPOS\) needs keys that are stored as every .*modulus=8.*, got"
    with pytest.raises(ValueError, match=message):
        decayed(blocks(-8, far), any_backend)


def test_a_region_past_the_cache_decides_nothing(any_backend):
    found = decayed(blocks(-8, PositionMap()), any_backend, slots=8)
    wanted = decayed(blocks(-8, PositionMap(modulus=8)), any_backend, slots=8)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
