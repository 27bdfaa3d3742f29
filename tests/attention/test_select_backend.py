"""Who attends on a GPU when no backend is named: the table, its override, that passes agree."""

from __future__ import annotations

import pytest
import torch
from attention_engines import TorchEngine, make

from extrope_kernels import methods, rope_attention, scores
from extrope_kernels.ops.attention import make_call, op, reference, select_backend
from extrope_kernels.ops.attention.flash_attn.engine_check import Kind
from extrope_kernels.ops.attention.select_backend import TABLE, Selected, Shape, select

BF16, TWO = torch.bfloat16, (-(2**62), -2)


def shape(head_dim, seqlen, *rest, dtype=BF16, **refused):
    return Shape(Kind(dtype, head_dim, 4, False), seqlen, *rest, **refused)


def installed(*engines):
    return lambda engine: None if engine in engines else f"{engine} is not there"


def not_asked(engine):
    raise AssertionError(f"{engine} was asked for")


@pytest.mark.parametrize(
    ("major", "call", "engines", "chosen", "reason"),
    [
        (9, shape(128, 16384), ("flash-attn 3",), "flash_attn", "flash-attn 3 from 16384"),
        (9, shape(128, 99999), ("flash-attn 4",), "flash_attn", "flash-attn 4 from 16384"),
        (9, shape(64, 32768, dtype=torch.float16), ("flash-attn 3",), "flash_attn", "estimated"),
        (9, shape(64, 32767), None, "triton", "shorter than 32768 tokens"),
        (9, shape(256, 16384), ("flash-attn 3",), "triton", "flash-attn 4 is not there"),
        (9, shape(128, 16384), (), "triton", "4 is not there; flash-attn 3 is not there"),
        (10, shape(128, 8192), ("flash-attn 4",), "flash_attn", "flash-attn 4 from 8192"),
        (10, shape(192, 8192), None, "triton", "no backward with a window beyond 128"),
        (8, shape(128, 99999), None, "triton", "flash-attn 2 is hardly faster"),
        (12, shape(128, 99999), None, "triton", "no repeatable backward there"),
        (11, shape(128, 99999), None, "triton", "no row for compute capability 11.x"),
        (9, shape(128, 99999, dtype=torch.float32), None, "triton", "dtypes, got torch.float32"),
        (9, shape(128, 99999, 96), None, "triton", "regions of granularity 1, got 96"),
        (9, shape(128, 99999, 1, True), None, "triton", "log_decay"),
        (9, shape(128, 99999, pair_maps=True), None, "triton", "maps of pairs in PyTorch"),
        (9, shape(128, 99999, refused="q_start"), None, "triton", "does not take q_start"),
    ],
)
def test_table(major, call, engines, chosen, reason):
    found = select(major, call, not_asked if engines is None else installed(*engines))
    assert found.backend == chosen and reason in found.reason
    assert found.engine == (engines[0] if chosen == "flash_attn" else None)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_engines_of_a_row_take_every_call_it_fits(row):
    """The gradient of lse too, which needs dims of its own where the engine has none."""
    for engine in (select_backend._ENGINES[name] for name in row.engines):
        for head_dim in range(8, row.head_dim + 1, 8):
            assert engine.refuses((row.major, 0), head_dim) is None
            assert head_dim + (0 if engine.takes_dlse else 8) <= engine.max_head_dim


@pytest.mark.parametrize("override", ["triton", "flash_attn"])
def test_override_goes_before_the_table(override):
    call = shape(128, 1, dtype=torch.float32)
    assert select(8, call, not_asked, override) == Selected(
        override, f"EXTROPE_ATTENTION={override}"
    )


# -------------------------------------------------------------------------------------------------
# The ops. On a CPU the choice is made as on an H100, over an engine made of PyTorch.


@pytest.fixture
def engine(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the engine is for tensors on a CPU")
    made = TorchEngine("selected", negative_right=True, dlse=True)
    monkeypatch.delenv("EXTROPE_ATTENTION", raising=False)
    monkeypatch.setattr(select_backend, "_major", lambda device: 9)
    monkeypatch.setattr(select_backend, "_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(
        select_backend, "TABLE", (select_backend.Row(9, 256, 11, ("flash-attn 4",), ""),)
    )
    monkeypatch.setitem(select_backend._ENGINES, "flash-attn 4", made)
    monkeypatch.setattr(select_backend, "unusable", lambda *_: None)
    select_backend._select.cache_clear()
    yield made
    select_backend._select.cache_clear()


def both_passes(q, k, v, call, dout, dlse):
    """out, lse and gradients of the ops as they run on a GPU."""
    out, lse = op._fwd_cuda(q, k, v, *call.tensors, **call.options)
    return out, lse, *op._bwd_cuda(dout, dlse, q, k, v, out, lse, *call.tensors, **call.options)


def expected(q, k, v, call, dout, dlse):
    out, lse = reference.forward(q, k, v, call)
    return out, lse, *reference.backward(dout, dlse, q, k, v, out, lse, call)


@pytest.mark.parametrize("seqlen", [11, 10])
def test_backward_runs_what_forward_ran(engine, seqlen):
    pytest.importorskip("triton")
    inputs = make(TWO, seqlen, seqlen, dtype=torch.float32)
    inputs = (*inputs[:-1], inputs[-1].float())
    for got, want in zip(both_passes(*inputs), expected(*inputs)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    calls = [call for call in engine.calls if call != (2, 0)]
    assert (len(calls) >= 4) == (seqlen == 11)


@pytest.mark.parametrize("ends, reached", [([0, 11, 20], False), ([0, 3, 22], True)])
def test_packed_sequences_count_by_their_mean(engine, ends, reached):
    *inputs, _ = make(TWO, cu_seqlens=ends, dtype=torch.float32)
    both_passes(*inputs, None)
    assert bool(engine.calls) == reached


def test_a_backend_is_selected_once(engine, monkeypatch):
    made = []
    monkeypatch.setattr(select_backend, "select", lambda *x: made.append(x) or select(*x))
    *inputs, _ = make(TWO, dtype=torch.float32)
    for _ in range(3):
        both_passes(*inputs, None)
    assert len(made) == 1
    monkeypatch.setenv("EXTROPE_ATTENTION", "triton")  # which is read at every call
    engine.calls.clear()
    both_passes(*inputs, None)
    assert not engine.calls


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("fa3", ValueError, "attention: EXTROPE_ATTENTION must be triton or flash_attn, got 'fa3'"),
        ("flash_attn", NotImplementedError, "EXTROPE_ATTENTION=flash_attn cannot run here: flash"),
    ],
)
def test_override_that_cannot_be(engine, monkeypatch, value, error, message):
    monkeypatch.setenv("EXTROPE_ATTENTION", value)
    inputs = make(TWO, dtype=torch.float32)
    with pytest.raises(error, match=message):
        both_passes(*inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("override", ["", "triton"])
def test_compiled_as_eager(monkeypatch, override):
    monkeypatch.setenv("EXTROPE_ATTENTION", override)
    q, k, v = (torch.randn(1, 300, 4, 64, device="cuda", dtype=BF16) for _ in range(3))
    freqs = methods.rope(64).to("cuda")

    def attend(q, k, v):
        return rope_attention(q, k, v, freqs, scores.rerope(100))

    assert torch.equal(torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v))


def test_tracing_selects_nothing(monkeypatch):
    monkeypatch.setattr(select_backend, "select", not_asked)
    call = make_call(methods.rope(64).to("meta"), scores.rerope(100))
    q = torch.empty(1, 300, 4, 64, device="meta", dtype=BF16)
    out, lse = op._fwd_fake(q, q, q, *call.tensors, **call.options)
    assert out.shape == q.shape and lse.shape == (1, 4, 300)


def test_report_names_rows_and_reasons(monkeypatch):
    monkeypatch.delenv("EXTROPE_ATTENTION", raising=False)
    lines = select_backend.selections()
    assert lines.popitem() == ("attention on other GPUs", "triton")
    if not torch.cuda.is_available():
        assert len(lines) == len(TABLE)
    monkeypatch.setattr(select_backend, "why_not", lambda *_: None)
    if not torch.cuda.is_available():
        line = select_backend.selections()["attention on sm_9x, head_dim to 184"]
        assert line == "flash_attn: flash-attn 4 from 16384 tokens on (estimated), triton below"
    monkeypatch.setenv("EXTROPE_ATTENTION", "triton")
    assert select_backend.selections() == {"attention on cuda": "EXTROPE_ATTENTION=triton"}


OPTIONS = {
    "softcap": (1.5, "flash_attn"),
    "sliding_window": (3, "flash_attn"),
    "sinks": (torch.zeros(4), "flash_attn"),
    "q_start": (torch.zeros(1, dtype=torch.int32), "triton"),
    "k_start": (torch.zeros(1, dtype=torch.int32), "triton"),
}


@pytest.mark.parametrize("option", [*OPTIONS, "head_dim of v"])
def test_what_the_composition_does_not_take_goes_to_triton(engine, option):
    q, k, v, call, *_ = make(TWO, dtype=torch.float32)
    value, who = OPTIONS.get(option, (None, "triton"))
    if option in OPTIONS:
        call = call._replace(**{option: value})
    else:
        v = v[..., :8]
    selected = select_backend.select_backend(q, k, v, call)
    assert selected.backend == who and (selected.engine == "flash-attn 4") == (who != "triton")
