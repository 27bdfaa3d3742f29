"""Region attention in Triton, on a GPU or interpreted, against float64.

Blocks are 16 x 16 here: small enough for every border to fall inside, on and beside a block.
"""

from __future__ import annotations

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

from attention_oracle import (
    attend,
    check_both,
    frequencies,
    gradients,
    make_qkv,
    rounding_noise,
)
from rope_oracle import DEVICE, INTERPRETED, Guarded
from score_examples import EXAMPLES, PLAIN, Example, example_of

from extrope_kernels import methods, scores
from extrope_kernels.ops._shared.layouts import forget
from extrope_kernels.ops.attention import AttentionCall
from extrope_kernels.ops.attention.triton import backward, configs, device, forward
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


MADE = {
    "no score": PLAIN,
    **EXAMPLES,
    "inv_leaky": example_of(scores.rerope(7, 0.4)),
    "window": regions(-8),
    "two_of_a_window": regions(-24, -6),
    "three": regions(FIRST_KEY, -20, -7),
}
# The interpreter does not round to bfloat16.
LOW = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)


def both(
    made: Example, seqlens=(37, 37), heads=(1, 1), head_dim=16, dtype=torch.float32, **options
):
    """Outputs and gradients, against the closed form."""
    check_both("triton", made, make_qkv(1, *seqlens, *heads, head_dim, dtype), **options)


def against_reference(made: Example, qkv, freqs, with_gradients=True, **options) -> None:
    """Outputs and gradients of a float32 call that no closed form here describes."""

    def run(backend, *tensors):
        sinks = options.get("sinks")
        own = {} if sinks is None else {"sinks": sinks.to(tensors[0].dtype)}
        return attend(made, *tensors, freqs, backend, **{**options, **own})

    dout, found = torch.randn_like(qkv[0]), []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        tensors = [x if dtype is None else x.to(dtype) for x in qkv]
        results = [x.detach() for x in run(backend, *tensors)]
        if with_gradients:
            results += gradients(lambda *x: run(backend, *x), tensors, dout)  # noqa: B023
        found.append(results)
    scale = options.get("softmax_scale", 0.25) * freqs.attention_factor**2
    for name, got, near, exact in zip(("dv", "lse", "dq", "dk", "dv"), *found):
        seen = exact > -torch.inf
        assert torch.equal(got > -torch.inf, seen)
        noise = (
            0.0 if name == "lse" else rounding_noise(name, exact, found[2][1], dout, *qkv, scale)
        )
        got, near, exact = (x.masked_fill(~seen, 0.0) for x in (got, near, exact))
        assert_within_budget(name, got, near, exact, noise=noise)


@pytest.mark.parametrize("name", MADE)
def test_regions_and_maps(name):
    both(MADE[name])


def test_float16():
    both(MADE["leaky_rerope"], (19, 19), dtype=torch.float16)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_low_precision(name, dtype):
    both(MADE[name], (35, 35), dtype=dtype)


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
    for stored in (UNROTATED, position_map):
        made = example_of(Score("test", sides, stored=stored))
        tensors = make_qkv(1, 21, None, 1, 1, 16)
        against_reference(made, tensors, frequencies(16), with_gradients=False, keys_stored=True)


@pytest.mark.parametrize("k_start", (0, 2**29 - 40))
def test_starts_to_the_last_that_is_taken(k_start):
    starts = {"q_start": 2**29 - 1, "k_start": k_start}
    never_far = example_of(scores.leaky_rerope(2**40, 4.0))
    for made in (MADE["leaky_rerope"], MADE["dual_chunk"], never_far):
        against_reference(made, make_qkv(1, 5, 37, 1, 1, 16), frequencies(16), **starts)


@pytest.mark.parametrize("first", (0, -34), ids=str)
def test_gradients_where_an_amplitude_overflows_out_of_sight(first):
    """No query sees a key of the far region, and those before position 0 see none at all."""
    freqs = replace(frequencies(16), log_decay=torch.full((8,), -5.0, device=DEVICE))
    made = example_of(scores.string(shift=40, window=4))
    tensors = make_qkv(1, 6 - first, 6, 1, 1, 16)
    against_reference(made, tensors, freqs, k_start=0)


@pytest.mark.parametrize("window", (1, BLOCK - 1, BLOCK, BLOCK + 1, 36, 37))
def test_windows(window):
    both(example_of(scores.rerope(window)))


@pytest.mark.parametrize("seqlens", ((1, 1), (1, 37), (17, 41), (41, 17), (32, 32)), ids=str)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_lengths(name, seqlens):
    both(MADE[name], seqlens)


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)), ids=str)
def test_nothing_to_attend(shape):
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE) for n in (shape[0], shape[1], shape[1]))
    against_reference(MADE["rerope"], (q, k, v), frequencies(16))


@pytest.mark.parametrize("bounds", ([0, 0, 3, 3, 4, 22, 22], [0, 32], [0, 0]), ids=str)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_packed_sequences(name, bounds):
    tensors = [x[0, : bounds[-1]] for x in make_qkv(1, 40, None, 1, 1, 16)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    against_reference(MADE[name], tensors, frequencies(16), cu_seqlens=cu_seqlens, log_n=5.0)


def test_heads_of_their_own_frequencies():
    of_heads = frequencies(16).inv_freq * torch.tensor([[[1.0], [0.3]]], device=DEVICE)
    against_reference(MADE["rerope"], make_qkv(1, 17, 17, 4, 2, 16), methods.RopeFreqs(of_heads))


@pytest.mark.parametrize("heads", ((3, 1), (4, 2)), ids=str)
def test_query_heads_share_keys(heads):
    both(MADE["rerope"], (17, 17), heads)


@pytest.mark.parametrize("name", ("rerope", "leaky_rerope", "blockwise_causal"))
@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_everything_at_once(name, packed):
    """Frequencies of each sequence, decay, log_n, factor, interleaved, partial, caps, sinks, ..."""
    xpos = methods.xpos(12).to(DEVICE)
    rows = xpos.inv_freq * torch.tensor([[1.0], [0.6]], device=DEVICE)
    freqs = replace(xpos, inv_freq=rows, attention_factor=1.2)
    options = {
        "log_n": 5.0, "interleaved": True, "softcap": 3.0, "sliding_window": 14,
        "rotary_offset": 4,
        "sinks": torch.linspace(-2, 2, 2, device=DEVICE),
    }  # fmt: skip
    q, k, v = make_qkv(2, *((19, 19) if packed else (6, 19)), 2, 1, 16)
    options["query_scale"] = torch.linspace(0.5, 1.5, q.shape[1], device=DEVICE)
    if packed:
        q, k, v = (x[0] for x in (q, k, v))
        options["cu_seqlens"] = torch.tensor([0, 2, 19], dtype=torch.int32, device=DEVICE)
    else:
        starts = torch.tensor([13, 16], dtype=torch.int32, device=DEVICE)
        options |= {"q_start": starts, "k_start": starts - 13}
    against_reference(MADE[name], (q, k, v), freqs, **options)


@pytest.mark.parametrize("head_dim", (8, 24, 96, 256))
def test_head_dims(head_dim):
    both(MADE["rerope"], (19, 19), head_dim=head_dim)


@pytest.mark.parametrize("head_dim", (32, 72))
def test_rows_in_two_parts(head_dim, monkeypatch):
    tiles(monkeypatch, halves=True)
    both(MADE["rerope"], (21, 21), head_dim=head_dim)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize(
    "rotary_dim, rotary_offset, halves", ((16, 32, True), (16, 8, False), (22, 26, True))
)
def test_rotated_dims_in_their_place(rotary_dim, rotary_offset, halves, interleaved, monkeypatch):
    tiles(monkeypatch, halves=halves)
    freqs, by = frequencies(48, rotary_dim=rotary_dim), {"rotary_offset": rotary_offset}
    both(MADE["leaky_rerope"], (21, 21), head_dim=48, freqs=freqs, interleaved=interleaved, **by)


# -------------------------------------------------------------------------------------------------
# What they touch, and what they compile


def call_of(made: Example, head_dim: int = 16, cu_seqlens=None, **options) -> AttentionCall:
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
    call = call_of(MADE["rerope"], 24, bounds)
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


def test_the_same_bits_every_time():
    q, k, v = make_qkv(1, 19, None, 2, 1, 16, torch.float16)
    call, dout = call_of(MADE["rerope"]), torch.randn_like(q)
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
    call = call_of(MADE[name], sliding_window=window)
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
        call = call_of(MADE["rerope"], softcap=1.5, sliding_window=12)
        seen.add(device.constants_of(configs.INTERPRETED, *tensors, call))
    assert len(seen) == 1


def test_tokens_too_far_apart_for_offsets_of_a_block():
    q, k, _ = make_qkv(1, 2, None, 1, 1, 16, torch.float16)
    far = torch.empty_strided((1, 2, 1, 16), (0, 2**24, 0, 1), dtype=q.dtype, device=DEVICE)
    with pytest.raises(ValueError, match="less than 16777216 elements apart, got strides"):
        forward(q, k, far, call_of(EXAMPLES["rerope"]))


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's addresses")
@pytest.mark.parametrize("side", ("before", "behind", "itself"))
def test_no_byte_outside_of_tensors_is_touched(side):
    """Masked lanes included: pages that may not be touched lie around every tensor."""
    script = Path(__file__).parents[1] / "support" / "guard_pages.py"
    done = subprocess.run([sys.executable, script, side], capture_output=True, text=True)
    if side == "itself":  # such a page does end the process
        assert done.stdout == "alive\n" and done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout.split()[0]) > 100
