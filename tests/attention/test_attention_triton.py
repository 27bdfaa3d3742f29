"""Region attention in Triton, on a GPU or interpreted, against dense masks in float64.

Blocks are 16 x 16 here: small enough for every border to fall inside, on and beside a block.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rope_oracle import DEVICE, Guarded
from triton_attention_oracle import call_of, check, check_backward, inputs

from extrope_kernels import methods, scores
from extrope_kernels.ops._shared.triton.launch import Plan, forget
from extrope_kernels.ops.attention.triton import backward, configs, forward, launch, plans
from extrope_kernels.scores.base import FIRST_KEY, SAME, UNROTATED, PositionMap, Region, Score

BLOCK = 16


def tiles(monkeypatch, **changes) -> None:
    small = configs.Config(BLOCK, BLOCK, warps=1, stages=1, rotated=BLOCK // 2)
    monkeypatch.setattr(plans, "config", lambda *_: small._replace(**changes))
    forget()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    tiles(monkeypatch)
    yield
    monkeypatch.undo()
    forget()


def plain(*starts: int) -> Score:
    """Regions of which each has a map of its own."""
    maps = (UNROTATED, PositionMap(offset=2), PositionMap(divisor=3.0, floor=True))
    return Score("test", tuple(Region(s, m, SAME) for s, m in zip(starts, maps)))


SCORES = {
    "rope": scores.rerope(7, 1.0),
    "rerope": scores.rerope(7),
    "leaky": scores.rerope(7, 3.0),
    "inv_leaky": scores.rerope(7, 0.4),
    "self_extend": scores.self_extend(6, 3),
    "dual_chunk": scores.dual_chunk(14, 4),
    "blockwise_causal": scores.blockwise_causal(20),
    "string": scores.string(9, 3),
    "window": plain(-8),
    "two_of_a_window": plain(-24, -6),
    "three": plain(FIRST_KEY, -20, -7),
}


@pytest.mark.parametrize("name", SCORES)
def test_regions_and_maps(name):
    check_backward(*inputs(37, 37), call_of(SCORES[name]))


@pytest.mark.parametrize(
    "position_map",
    (
        PositionMap(modulus=5, divisor=2.0, floor=True, offset=3, cap=4),
        PositionMap(modulus=2**40, offset=-3),
        PositionMap(divisor=2.0, floor=True, offset=0.25),
        PositionMap(divisor=2.0**40, floor=True, offset=7),
        PositionMap(offset=0.75),
        PositionMap(divisor=math.inf, offset=1.5),
        PositionMap(modulus=6, divisor=0.7, offset=-2),
    ),
    ids=str,
)
def test_position_maps(position_map):
    score = Score("test", (Region(FIRST_KEY, SAME, position_map), Region(-6, position_map, SAME)))
    for stored in (UNROTATED, position_map):
        call = replace(call_of(score), maps=(*score.maps[:-5], *map(float, stored)))
        check(*inputs(21, 21), call)


def test_floors_of_fractions_are_refused():
    score = Score("test", (Region(FIRST_KEY, SAME, PositionMap(divisor=2.5, floor=True)),))
    with pytest.raises(ValueError, match=r"needs a whole divisor, got 2\.5"):
        forward(*inputs(3, 3), call_of(score))


@pytest.mark.parametrize("window", (1, BLOCK - 1, BLOCK, BLOCK + 1, 36, 37))
def test_windows(window):
    check_backward(*inputs(37, 37), call_of(scores.rerope(window)))


@pytest.mark.parametrize(
    "seqlens", ((1, 1), (1, 37), (17, 41), (41, 17), (32, 32), (0, 5), (5, 0), (0, 0)), ids=str
)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_lengths(name, seqlens):
    out, lse, dq, _, _ = check_backward(*inputs(*seqlens), call_of(SCORES[name]))
    empty = max(0, seqlens[0] - seqlens[1])
    assert torch.all(out[:, :empty] == 0) and torch.all(lse[..., :empty] == -torch.inf)
    assert torch.all(dq[:, :empty] == 0)


@pytest.mark.parametrize("cu_seqlens", ([0, 0, 17, 17, 18, 37, 37], [0, 32], [0, 0]), ids=str)
@pytest.mark.parametrize("name", ("rerope", "dual_chunk"))
def test_packed_sequences(name, cu_seqlens):
    total = cu_seqlens[-1]
    call = call_of(SCORES[name], cu_seqlens=cu_seqlens, log_n=5.0)
    check_backward(*inputs(total, total, batch=()), call)


def test_packed_equals_each_sequence_alone():
    bounds = [0, 0, 17, 18, 40]
    q, k, v = inputs(40, 40, batch=())
    packed, _ = forward(q, k, v, call_of(SCORES["rerope"], cu_seqlens=bounds))
    for begin, end in itertools.pairwise(bounds):
        alone = (x[None, begin:end] for x in (q, k, v))
        assert torch.equal(forward(*alone, call_of(SCORES["rerope"]))[0][0], packed[begin:end])


@pytest.mark.parametrize("heads", ((3, 1), (4, 2)), ids=str)
def test_query_heads_share_keys(heads):
    check_backward(*inputs(17, 17, *heads), call_of(SCORES["rerope"]))


@pytest.mark.parametrize("name", ("rerope", "leaky", "blockwise_causal"))
@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_everything_at_once(name, packed):
    """Frequencies of each sequence, decay, log_n, factor, interleaved, partial, two heads of k."""
    xpos = methods.xpos(12)
    options = {
        "inv_freq": xpos.inv_freq * torch.tensor([[1.0], [0.6]]),
        "log_decay": xpos.log_decay.to(DEVICE),
        "log_n": 5.0,
        "attention_factor": 1.2,
        "interleaved": True,
    }
    call = call_of(SCORES[name], cu_seqlens=[0, 8, 21] if packed else None, **options)
    seqlens = (21, 21) if packed else (11, 19)
    check_backward(*inputs(*seqlens, 4, 2, batch=() if packed else (2,)), call, with_dlse=False)


@pytest.mark.parametrize("head_dim", (8, 24, 96, 256))
def test_head_dims(head_dim):
    check_backward(*inputs(19, 19, head_dim=head_dim), call_of(SCORES["rerope"], head_dim))


@pytest.mark.parametrize("head_dim", (32, 72))
def test_rows_in_two_parts(head_dim, monkeypatch):
    tiles(monkeypatch, halves=True)
    check_backward(*inputs(21, 21, head_dim=head_dim), call_of(SCORES["rerope"], head_dim))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_low_precision(name, dtype):
    check_backward(*inputs(35, 35, dtype=dtype), call_of(SCORES[name]))


def test_the_same_bits_every_time():
    q, k, v = inputs(19, 19, 2, 1, dtype=torch.float16)
    call, dout = call_of(SCORES["rerope"]), torch.randn_like(q)
    runs = []
    for _ in range(2):
        out, lse = forward(q, k, v, call)
        runs.append((out, lse, *backward(dout, None, q, k, v, out, lse, call)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_strides_and_nothing_around(packed, monkeypatch):
    """Heads before tokens, in buffers of NaN; and outputs in such buffers, found whole after."""

    def strided(x: Tensor) -> Tensor:
        _, seqlen, heads, dim = x.shape
        strides = (heads * seqlen * dim + 8, dim, seqlen * dim + 8, 1)
        inside = Guarded(tuple(x.shape), strides, x.dtype).tensor
        inside.copy_(x)
        return inside[0] if packed else inside

    outputs = []

    def guarded(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        contiguous = torch.empty(shape, device="meta").stride()
        outputs.append(Guarded(tuple(shape), contiguous, dtype))
        return outputs[-1].tensor

    monkeypatch.setattr(launch, "empty", guarded)
    monkeypatch.setattr(launch, "empty_like", lambda x, dtype: guarded(x.shape, dtype, x.device))
    q, k, v = map(strided, inputs(19, 19, 2, 1, head_dim=24))
    dout = strided(torch.randn(1, 19, 2, 24, device=DEVICE))
    dlse = torch.randn(1, device=DEVICE).expand(*dout.shape[:-3], 2, 19)
    check(q, k, v, call_of(SCORES["rerope"], 24, [0, 11, 19] if packed else None), dlse, dout)
    assert len(outputs) == 11  # k in frames, out, lse; frames, delta, gradients of frames and all
    for output in outputs:
        output.assert_untouched_around()
        assert not output.tensor.isnan().any()


@pytest.mark.parametrize("name, launches", (("rope", 2), ("rerope", 2), ("dual_chunk", 2)))
def test_launches(name, launches, monkeypatch):
    """Two kernels forward, four backward."""
    seen = []

    def counted(plan, given):
        seen.append(plan.kernel.__name__)
        ordinary(plan, given)

    ordinary = Plan._launch
    monkeypatch.setattr(Plan, "_launch", counted)
    q, k, v = inputs(17, 17)
    out, lse = forward(q, k, v, call_of(SCORES[name]))
    assert seen == ["rotate_kernel", "forward_kernel"][-launches:]
    backward(out, None, q, k, v, out, lse, call_of(SCORES[name]))
    assert seen[launches:] == ["rotate_kernel", "dq_kernel", "dkv_kernel", "rotate_kernel"]


@pytest.mark.parametrize("window", (1, BLOCK, BLOCK + 3))
@pytest.mark.parametrize("name", ("leaky", "dual_chunk", "blockwise_causal"))
def test_keys_before_every_window_are_not_read(name, window):
    """Nor rotated: whatever they hold, the outputs have the same bits."""
    q, k, v = inputs(19, 83)
    call = replace(call_of(SCORES[name]), sliding_window=window)
    want = forward(q, k, v, call)
    unseen = 83 - 19 - window + 1
    k[:, :unseen] = v[:, :unseen] = torch.nan
    for found, expected in zip(forward(q, k, v, call), want):
        assert torch.equal(found, expected)


def test_what_no_plain_call_pays_for():
    """None for what is absent: Triton then compiles no parameter, and no branch."""
    q, k, v = inputs(17, 17)
    plan = plans.forward_plans(q, k, v, call_of(SCORES["rerope"]))
    names = plan.attend.kernel.arg_names[-len(plan.attend.settled) :]
    settled = dict(zip(names, plan.attend.settled))
    for name in ("query_scale_stride", "start_strides", "window", "softcap"):
        assert settled[name] is None
    assert not settled["TILE"].windowed and not settled["TILE"].capped
    assert settled["VALUES"] == settled["TILE"] and plan.q_frame is None


def test_another_value_compiles_nothing(monkeypatch):
    """Caps, windows and starts are numbers of a call: the tile does not know them."""
    q, k, v = inputs(17, 17)
    seen = set()
    for softcap, window in ((1.5, 12), (2.0, 16)):
        call = replace(call_of(SCORES["rerope"]), softcap=softcap, sliding_window=window)
        plan = plans.forward_plans(q, k, v, call)
        seen.add(plan.attend.settled[-2:])
    assert len(seen) == 1


def test_tokens_too_far_apart_for_offsets_of_a_block():
    q, k, _ = inputs(2, 2, dtype=torch.float16)
    far = torch.empty_strided((1, 2, 1, 16), (0, 2**24, 0, 1), dtype=q.dtype, device=DEVICE)
    with pytest.raises(ValueError, match="less than 16777216 elements apart, got strides"):
        forward(q, k, far, call_of(SCORES["rope"]))
