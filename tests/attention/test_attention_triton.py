"""Region attention in Triton, on a GPU or interpreted, against float64.

Blocks are 16 x 16 here: small enough for every border to fall inside, on and beside a block.
"""

from __future__ import annotations

import functools
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from support.attention_oracle import (
    attend,
    check_both,
    check_outputs,
    frequencies,
    gradients,
    make_qkv,
    rounding_noise,
)
from support.rope_oracle import DEVICE, INTERPRETED, Guarded
from support.score_examples import EXAMPLES, PLAIN, Example, example_of
from support.triton_attention import backward, forward
from test_attention import call_of, ints, packed

from extrope_kernels import methods, scores
from extrope_kernels.ops._torch.layouts import forget
from extrope_kernels.ops.attention import AttentionCall
from extrope_kernels.ops.attention.triton import configs, device
from extrope_kernels.scores.base import FIRST_KEY, SAME, UNROTATED, PositionMap, Region, Score
from extrope_kernels.testing import assert_within_budget

BLOCK = 16


def tiles(monkeypatch, **changes) -> None:
    small = configs.Config(BLOCK, BLOCK, warps=1, stages=1, rotated=BLOCK // 2)
    monkeypatch.setattr(configs, "config", lambda *_: small._replace(**changes))
    forget()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    tiles(monkeypatch)
    yield
    forget()


def regions(*starts: int) -> Example:
    """Regions of which each has a map of its own."""
    maps = (UNROTATED, PositionMap(offset=2), PositionMap(divisor=3.0, floor=True))
    return example_of(Score("test", tuple(Region(s, m, SAME) for s, m in zip(starts, maps))))


def everything(name: str, *rows: int, **where) -> dict:
    """Frequencies of each sequence, decay, log_n, factor, interleaved, partial, caps, sinks, ..."""
    return {
        "log_n": 5.0, "interleaved": True, "softcap": 3.0, "sliding_window": 14, "rotary_dim": 12,
        "rotary_offset": 4, "attention_factor": 1.2, "rows": (1.0, 0.6), "head_dim": 16,
        "xpos": name == "blockwise_causal", "example": EXAMPLES[name],
        "sinks": torch.linspace(-2, 2, 2, device=DEVICE),
        "query_scale": torch.linspace(0.5, 1.5, rows[-1], device=DEVICE), **where,
    }  # fmt: skip


def of(name: str, seqlen_q: int = 21, seqlen_k: int = 21, **more) -> dict:
    made = {"example": MADE[name], "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    return {**made, "heads_q": 1, "head_dim": 16, **more}


MADE = {
    "no score": PLAIN,
    **EXAMPLES,
    "inverse leaky": example_of(scores.leaky_rerope(7, 0.4)),
    "a window": regions(-8),
    "two of a window": regions(-18, -6),
    "three regions": regions(FIRST_KEY, -18, -7),
}
BLOCKS = {"batch": 2, "seqlen_q": 6, "seqlen_k": 19, "q_start": ints(13, 16), "k_start": ints(0, 3)}
# Where there is no GPU every third is interpreted (see conftest.py): what alone shows something.
CASES = {
    "everything": everything("leaky_rerope", 6, **BLOCKS),
    "everything in rerope": everything("rerope", 6, **BLOCKS),
    "everything in packed rerope": everything("rerope", 19, **packed(2, 17)),
    "everything, packed": everything("blockwise_causal", 17, **packed(2, 15)),
    "self_extend": of("self_extend"),
    "string": of("string"),
    "three regions": of("three regions"),
    "a window": of("a window"),
    "two of a window": of("two of a window"),
    "more keys": of("dual_chunk", 17, 33),
    "blockwise_causal": of("blockwise_causal"),
    "one query": of("dual_chunk", 1, 33),
    "fewer keys": of("dual_chunk", 33, 17),
    "inverse leaky": of("inverse leaky"),
    "whole blocks": of("rerope", 32, 32),
    "packed": packed(0, 3, 18, 0, head_dim=16, heads_q=1, log_n=5.0,
                     example=MADE["dual_chunk"]),
    "packed into blocks": packed(0, 32, head_dim=16, heads_q=1, example=MADE["rerope"]),
    "nothing packed": packed(0, 0, head_dim=16, heads_q=1, example=MADE["rerope"]),
    "frequencies of heads": of("rerope", 9, 17, heads_q=4, heads_k=2, of_heads=(1.0, 0.3), batch=2,
                               head_dim_v=8),
    "three heads for one": of("rerope", 17, 17, heads_q=3),
    "leaky_rerope": of("leaky_rerope"),
    "no score in float16": of("no score", 19, 19, dtype=torch.float16),
    "leaky_rerope in float16": of("leaky_rerope", 19, 19, dtype=torch.float16),
    "24 dims": of("rerope", head_dim=24),
    "96 dims": of("leaky_rerope", 17, 17, head_dim=96),
    "256 dims": of("rerope", 17, 17, head_dim=256),
    "8 dims": of("rerope", head_dim=8),
    **{f"a window of {w}": of("no score", sliding_window=w) for w in (BLOCK + 1, 1, BLOCK)},
    **{f"rerope from {w} on": {**of("rerope"), "example": example_of(scores.rerope(w))}
       for w in (BLOCK, BLOCK + 1, 21)},
    # Far keys at an offset of 1, at a place that is interpreted everywhere.
    "rerope from 1 on": {**of("rerope"), "example": example_of(scores.rerope(1))},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    case = dict(CASES[name])
    made, xpos, of_heads = (case.pop(n, None) for n in ("example", "xpos", "of_heads"))
    tensors, freqs, options = call_of(case)
    if xpos:
        freqs = replace(freqs, log_decay=methods.xpos(12).log_decay.to(DEVICE))
    if of_heads:
        scale = torch.tensor(of_heads, device=DEVICE)[None, :, None]
        freqs = replace(freqs, inv_freq=freqs.inv_freq * scale)
    check_both("triton", made, tensors, freqs, **options)


# The interpreter does not round to bfloat16.
@pytest.mark.thorough
@pytest.mark.parametrize(
    "dtype", (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16), ids=str
)
@pytest.mark.parametrize("name", MADE)
def test_low_precision(name, dtype):
    tensors, freqs, options = call_of(of(name, 35, 35, dtype=dtype))
    check_both("triton", options.pop("example"), tensors, freqs)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize(
    "rotary_dim, rotary_offset, halves", ((22, 26, True), (16, 8, False), (16, 32, True))
)
def test_rotated_dims_in_their_place(rotary_dim, rotary_offset, halves, interleaved, monkeypatch):
    """halves: rows are read in two parts."""
    tiles(monkeypatch, halves=halves)
    by = {"rotary_dim": rotary_dim, "rotary_offset": rotary_offset, "interleaved": interleaved}
    tensors, freqs, options = call_of(of("leaky_rerope", 17, 17, head_dim=48, **by))
    check_both("triton", options.pop("example"), tensors, freqs, **options)


# -------------------------------------------------------------------------------------------------
# Positions and starts that no closed form here describes


def against_reference(made: Example, qkv, freqs, **options) -> list[torch.Tensor]:
    """Outputs and gradients of a float32 call, within the budget of the reference's in float64."""
    dout, found = torch.randn_like(qkv[0]), []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        run = functools.partial(attend, made, freqs=freqs, backend=backend, **options)
        tensors = [x if dtype is None else x.to(dtype) for x in qkv]
        results = [x.detach() for x in run(*tensors)]
        found.append([*results, *gradients(run, tensors, dout)])
    scale = qkv[0].shape[-1] ** -0.5 * freqs.attention_factor**2
    for name, got, near, exact in zip(("dv", "lse", "dq", "dk", "dv"), *found):
        seen = exact > -torch.inf
        assert torch.equal(got > -torch.inf, seen)
        noise = 0.0
        if name != "lse":
            noise = rounding_noise(name, exact, found[2][1], dout, *qkv, scale)
        got, near, exact = (x.masked_fill(~seen, 0.0) for x in (got, near, exact))
        assert_within_budget(name, got, near, exact, noise=noise)
    return found[0]


MAPS = (
    PositionMap(modulus=5, divisor=2.0, floor=True, offset=3, cap=4),
    PositionMap(modulus=2**40, offset=-3),
    PositionMap(divisor=2.0, floor=True, offset=0.25),
    PositionMap(divisor=2.0**40, floor=True, offset=7),
    PositionMap(offset=0.75),
    PositionMap(divisor=math.inf, offset=1.5),
    PositionMap(modulus=6, divisor=0.7, offset=-2),
)


@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_position_maps(position_map):
    sides = (Region(FIRST_KEY, SAME, position_map), Region(-6, position_map, SAME))
    tensors = make_qkv(1, 21, None, 1, 1, 16)
    for stored in (UNROTATED, position_map):
        score, options = Score("test", sides, stored=stored), {"rotated": "k"}
        run = functools.partial(attend, example_of(score), freqs=frequencies(16), **options)
        exact = run(*(x.double() for x in tensors), backend="reference")
        got, near = (run(*tensors, backend=backend) for backend in ("triton", "reference"))
        noise = rounding_noise("dv", *exact, None, *tensors, 0.25)
        check_outputs("triton", tensors[0], got, near, exact, (noise, 0.0))


@pytest.mark.parametrize("k_start", (0, 2**29 - 40))
def test_starts_to_the_last_that_is_taken(k_start):
    never_far = example_of(scores.leaky_rerope(2**40, 4.0))
    for made in (MADE["leaky_rerope"], MADE["dual_chunk"], never_far):
        tensors = make_qkv(1, 5, 37, 1, 1, 16)
        against_reference(made, tensors, frequencies(16), q_start=2**29 - 1, k_start=k_start)


@pytest.mark.parametrize("first", (0, -34), ids=str)
def test_gradients_where_an_amplitude_overflows_out_of_sight(first):
    """No query sees a key of the far region, and those before position 0 see none at all."""
    freqs = replace(frequencies(16), log_decay=torch.full((8,), -5.0, device=DEVICE))
    made = example_of(scores.string(shift=40, window=4))
    found = against_reference(made, make_qkv(1, 6 - first, 6, 1, 1, 16), freqs, k_start=0)
    assert all(x.isfinite().all() for x in found[2:])


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)), ids=str)
def test_nothing_to_attend(shape):
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE) for n in (shape[0], shape[1], shape[1]))
    against_reference(MADE["rerope"], (q, k, v), frequencies(16))


# -------------------------------------------------------------------------------------------------
# What they touch, and what they compile


def described(made: Example, head_dim: int = 16, cu_seqlens=None, **options) -> AttentionCall:
    inv_freq = frequencies(head_dim).inv_freq
    return AttentionCall(inv_freq, cu_seqlens, score=made.score, softmax_scale=0.2, **options)


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_strides_and_nothing_around(packed, monkeypatch):
    """Heads before tokens, in buffers of NaN; and outputs in such buffers, found whole after."""

    def strided(x: Tensor, gap: int = 8) -> Tensor:
        _, seqlen, heads, dim = x.shape
        strides = (heads * seqlen * dim + gap, dim + gap - 8, seqlen * (dim + gap), 1)
        inside = Guarded(tuple(x.shape), strides, x.dtype).tensor
        inside.copy_(x)
        return inside[0] if packed else inside

    outputs = []

    def guarded(like: Tensor, shape, dtype: torch.dtype | None = None, **of_interpreter) -> Tensor:
        if of_interpreter:
            return torch.empty(shape, dtype=dtype or like.dtype, **of_interpreter)
        contiguous = torch.empty(shape, device="meta").stride()
        outputs.append(Guarded(tuple(shape), contiguous, dtype or like.dtype))
        return outputs[-1].tensor

    qkv = make_qkv(1, 19, None, 2, 1, 24)
    q, k, v = map(strided, qkv, (8, 8, 16))
    bounds = torch.tensor([0, 11, 19], dtype=torch.int32, device=DEVICE) if packed else None
    call = described(MADE["rerope"], 24, bounds)
    dout = torch.randn_like(qkv[0])
    dlse = torch.randn(1, device=DEVICE).expand(*q.shape[:-3], 2, 19)
    *plain, plain_dout = (x[0] if packed else x for x in (*qkv, dout))
    want = forward(*plain, call)
    want += backward(plain_dout, dlse, *plain, *want, call)
    monkeypatch.setattr(Tensor, "new_empty", guarded)
    out, lse = forward(q, k, v, call)
    found = (out, lse, *backward(strided(dout), dlse, q, k, v, out, lse, call))
    monkeypatch.undo()
    assert all(torch.equal(x, y) for x, y in zip(found, want))
    assert len(outputs) == 11  # k in frames, out, lse; frames, delta, gradients of frames and all
    for output in outputs:
        output.assert_untouched_around()
        assert not output.tensor.isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has one order alone")
def test_the_same_bits_every_time():
    q, k, v = make_qkv(1, 17, None, 1, 1, 16, torch.float16)
    call, dout = described(MADE["rerope"]), torch.randn_like(q)
    runs = []
    for _ in range(2):
        out, lse = forward(q, k, v, call)
        runs.append((out, lse, *backward(dout, None, q, k, v, out, lse, call)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("window", (1, BLOCK, BLOCK + 3))
@pytest.mark.parametrize("name", ("leaky_rerope", "dual_chunk", "blockwise_causal"))
def test_keys_before_every_window_are_not_read(name, window):
    """Nor rotated: whatever they hold, the outputs have the same bits."""
    q, k, v = make_qkv(1, 19, 83, 1, 1, 16)
    call = described(MADE[name], sliding_window=window)
    want = forward(q, k, v, call)
    unseen = 83 - 19 - window + 1
    k[:, :unseen] = v[:, :unseen] = torch.nan
    for found, expected in zip(forward(q, k, v, call), want):
        assert torch.equal(found, expected)


def test_no_length_is_known_to_the_compiler():
    """What kernels are compiled for says nothing of it, but how many regions hold keys."""
    seen = set()
    for seqlen in (17, 40, 41):
        tensors = make_qkv(1, seqlen, None, 2, 1, 16)
        call = described(MADE["rerope"], softcap=1.5, sliding_window=12)
        seen.add(device.constants_of(configs.INTERPRETED, *tensors, call))
    assert len(seen) == 1


def test_tokens_too_far_apart_for_offsets_of_a_block():
    q, k, _ = make_qkv(1, 2, None, 1, 1, 16, torch.float16)
    far = torch.empty_strided((1, 2, 1, 16), (0, 2**24, 0, 1), dtype=q.dtype, device=DEVICE)
    with pytest.raises(ValueError, match="less than 16777216 elements apart, got strides"):
        forward(q, k, far, described(EXAMPLES["rerope"]))


def test_a_product_that_overflows_behind_the_mask(monkeypatch):
    """Query 0 does not see key 1, and their product is inf - inf: no gradient may become NaN."""
    tiles(monkeypatch, halves=True)  # a product for each: one of inf, one of -inf
    q, k, v = (torch.zeros(1, 2, 1, 32, device=DEVICE) for _ in "qkv")
    q[:, 0] = 1e20
    k[:, 1, 0, 1:16], k[:, 1, 0, 17:] = 1e20, -1e20  # all but pair 0, which turns too far
    v.normal_()
    call = described(EXAMPLES["rerope"], 32, softcap=2.0)  # its derivative is NaN there
    out, lse = forward(q, k, v, call)
    for gradient in backward(torch.ones_like(out), None, q, k, v, out, lse, call):
        assert gradient.isfinite().all()


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's addresses")
@pytest.mark.parametrize("side", ("before", "behind", "itself"))
def test_no_byte_outside_of_tensors_is_touched(side):
    """Masked lanes included: pages that may not be touched lie around every tensor."""
    command = [sys.executable, "-m", "support.guard_pages", side]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True)
    if side == "itself":  # such a page does end the process
        assert done.stdout == "alive\n" and done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout.split()[0]) > 100
