"""Who attends on a GPU when no backend is named: Triton, or what EXTROPE_ATTENTION says."""

from __future__ import annotations

import pytest
import torch
from support.attention_engines import TorchEngine, make

from extrope_kernels import methods, rope_attention, scores
from extrope_kernels.ops.attention import make_call, op, reference
from extrope_kernels.ops.attention.flash_attn import composition

BF16, TWO = torch.bfloat16, (-(2**62), -2)


@pytest.fixture
def engine(monkeypatch):
    """On a CPU, an engine made of PyTorch in place of the installed ones."""
    if torch.cuda.is_available():
        pytest.skip("the engine is for tensors on a CPU")
    made = TorchEngine("selected", dlse=True)
    monkeypatch.delenv("EXTROPE_ATTENTION", raising=False)
    monkeypatch.setattr(composition, "best_engine", lambda q: made)
    monkeypatch.setattr(composition.Engine, "dtypes", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(op.flash_attn, "missing", lambda: None)
    return made


def both_passes(q, k, v, call, dout, dlse):
    """out, lse and gradients of the ops as they run on a GPU."""
    out, lse = op.selected("attention_fwd")(q, k, v, *call.tensors, **call.options)
    return (
        out,
        lse,
        *op.selected("attention_bwd")(dout, dlse, q, k, v, out, lse, *call.tensors, **call.options),
    )


def expected(q, k, v, call, dout, dlse):
    out, lse = reference.forward(q, k, v, call)
    return out, lse, *reference.backward(dout, dlse, q, k, v, out, lse, call)


@pytest.mark.parametrize("value", [None, "triton", "flash_attn"])
def test_both_passes_run_what_the_environment_names(engine, monkeypatch, value):
    """It is read at every call."""
    pytest.importorskip("triton")
    if value is not None:
        monkeypatch.setenv("EXTROPE_ATTENTION", value)
    inputs = make(TWO, heads=(1, 1), dtype=torch.float32)
    inputs = (*inputs[:-1], inputs[-1].float())
    for got, want in zip(both_passes(*inputs), expected(*inputs)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(engine.calls) == (4 if value == "flash_attn" else 0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("fa3", ValueError, "attention: EXTROPE_ATTENTION must be triton or flash_attn, got 'fa3'"),
        ("flash_attn", NotImplementedError, "EXTROPE_ATTENTION=flash_attn cannot run here: flash"),
    ],
)
def test_what_cannot_be(monkeypatch, value, error, message):
    if torch.cuda.is_available():
        pytest.skip("flash-attn may be here")
    monkeypatch.setenv("EXTROPE_ATTENTION", value)
    with pytest.raises(error, match=message):
        both_passes(*make(TWO, dtype=torch.float32))
    assert message in op.selection()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("value", ["", "triton"])
def test_compiled_as_eager(monkeypatch, value):
    monkeypatch.setenv("EXTROPE_ATTENTION", value)
    q, k, v = (torch.randn(1, 300, 4, 64, device="cuda", dtype=BF16) for _ in range(3))
    freqs = methods.rope(64).to("cuda")

    def attend(q, k, v):
        return rope_attention(q, k, v, freqs, scores.rerope(100))

    assert torch.equal(torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v))


def test_tracing_selects_nothing(monkeypatch):
    monkeypatch.setenv("EXTROPE_ATTENTION", "neither")
    call = make_call(methods.rope(64).to("meta"), scores.rerope(100))
    q = torch.empty(1, 300, 4, 64, device="meta", dtype=BF16)
    out, lse = op._fwd_fake(q, q, q, *call.tensors, **call.options)
    assert out.shape == q.shape and lse.shape == (1, 4, 300)
