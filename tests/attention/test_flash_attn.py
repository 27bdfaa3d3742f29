"""The composition over flash-attention calls against the reference, on engines made of PyTorch."""

from dataclasses import replace

import pytest
import torch
from attention_engines import TorchEngine
from flash_attn_cases import CU_SEQLENS, ENGINES, N, assert_agrees, make, run

from extrope_kernels.ops.attention import flash_attn
from extrope_kernels.ops.attention.flash_attn import engine_check
from extrope_kernels.scores import FIRST_KEY

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_REGION = [(FIRST_KEY,), (-2,), (0,), (5,)]
REROPE = [(FIRST_KEY, 1 - window) for window in (1, 2, 5, N - 1, N, N + 1)]
OTHERS = [(-6, -2), (-3, -3), (FIRST_KEY, 1), (FIRST_KEY, 4), (-2, 1)]
LAYOUTS = ONE_REGION + REROPE + OTHERS


@pytest.mark.parametrize("starts", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("seqlens", "dlse"),
    [((N, N), False), ((N, N), True), ((4, N), True), ((N, 4), True), ((1, N), False)],
    ids=str,
)
@pytest.mark.parametrize("name", ["cuts", "aten"])
def test_agrees_with_the_reference(name, starts, seqlens, dlse):
    assert_agrees(ENGINES[name], make(starts, *seqlens), dlse)


@pytest.mark.parametrize("starts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
def test_agrees_with_the_reference_packed(engine, starts, dlse):
    assert_agrees(engine, make(starts, cu_seqlens=CU_SEQLENS), dlse)


SWITCHES = {
    "sinks": {"sinks": torch.tensor([3.0, -1.0, 0.0, -torch.inf], dtype=torch.float64)},
    "softcap": {"softcap": 0.7},
    "sliding_window of the near region": {"sliding_window": 2},
    "sliding_window of both": {"sliding_window": 5},
    "query_scale": {"query_scale": torch.linspace(0.5, 1.5, N)},
}


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["dense", "packed"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_softmax_options(engine, switch, cu_seqlens):
    """Sinks join as a set of keys of their own, windows as bands, caps are the engine's."""
    options = SWITCHES[switch]
    if engine is ENGINES["aten"] and "softcap" in options:
        pytest.skip("PyTorch's attention has no cap")
    *tensors, call, dout, dlse = make((FIRST_KEY, -2), cu_seqlens=cu_seqlens)
    if "query_scale" in options:
        options = {"query_scale": torch.linspace(0.5, 1.5, tensors[0].shape[-3])}
    assert_agrees(engine, (*tensors, replace(call, **options), dout, dlse))


def test_refuses_what_it_cannot_compose(engine):
    q, k, v, call, *_ = make((FIRST_KEY, -2))
    start = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="does not take q_start, got one"):
        flash_attn.forward(q, k, v, replace(call, q_start=start), engine)
    with pytest.raises(NotImplementedError, match="v must have q's head_dim 16, got 8"):
        flash_attn.forward(q, k, v[..., :8], call, engine)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (3, 3), (8, 2)], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["dense", "packed"])
def test_heads(engine, heads, cu_seqlens):
    assert_agrees(engine, make((FIRST_KEY, -2), heads=heads, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("sizes", [(0, N), (N, 0), (0, 0)], ids=str)
def test_nothing_to_attend(engine, sizes):
    inputs = make((FIRST_KEY, -2), *sizes)
    got = run(flash_attn, *inputs, engine=engine)
    assert (got.pop("lse") == -torch.inf).all()
    assert all((x == 0).all() for x in got.values())
    assert got["dv"].shape == inputs[2].shape and got["dq"].shape == inputs[0].shape


def test_packed_without_tokens(engine):
    got = run(flash_attn, *make((FIRST_KEY, -2), cu_seqlens=[0, 0]), engine=engine)
    assert got["out"].shape == (0, 4, 16) and got["lse"].shape == (4, 0)


def test_strided_inputs(engine):
    q, k, v, call, dout, dlse = make((FIRST_KEY, -2), heads=(2, 2))
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat((k, v), dim=-1)
    keys, values = fused[..., :16], fused[..., 16:]
    dout = dout[:1].expand(2, -1, -1, -1)
    assert_agrees(engine, (heads_first, keys, values, call, dout, dlse))


def test_a_window_of_everything_is_one_plain_call():
    engine = TorchEngine("counted")
    q, k, v, call, *_ = make((FIRST_KEY, -N))
    examined = engine_check.examine(engine, v)
    engine.calls.clear()
    out, lse = flash_attn.forward(q, k, v, call, engine)
    assert examined.lse_unit == 1.0 and engine.calls == [(None, 0)]
    plain = replace(call, starts=(FIRST_KEY,), maps=call.maps[10:])
    for got, want in zip((out, lse), flash_attn.forward(q, k, v, plain, engine)):
        assert torch.equal(got, want)


def test_repeats_bit_for_bit(engine):
    inputs = make((FIRST_KEY, -2), cu_seqlens=CU_SEQLENS)
    first, second = (run(flash_attn, *inputs, engine=engine) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
