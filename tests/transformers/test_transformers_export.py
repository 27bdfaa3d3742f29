"""Graphs of extended models: ONNX, `torch.export`, `torch.jit.trace`; and models of no weights."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import build, logits, tokens, transformers
from torch import nn

from extrope_kernels.integrations.transformers import extend

IDS = tokens(1, 40)
METHODS = [("yarn", {"factor": 4.0}), ("rerope", {"window": 7})]


class Logits(nn.Module):
    """What exporters take: tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_a_trace_serves_every_length(method, parameters):
    model = build("qwen3").requires_grad_(False)
    with extend(model, method, **parameters):
        traced = torch.jit.trace(Logits(model), (IDS,))
        for length in (40, 23, 57):
            ids = tokens(1, length, seed=length)
            torch.testing.assert_close(traced(ids), logits(model, ids))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_an_exported_program_and_restore_after_it(method, parameters, strict):
    model = build("llama").requires_grad_(False)
    plain = logits(model, IDS)
    with extend(model, method, **parameters):
        program = torch.export.export(Logits(model), (IDS,), strict=strict)
        torch.testing.assert_close(program.module()(IDS), logits(model, IDS))
    assert torch.equal(logits(model, IDS), plain)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_onnx_of_a_frequency_method(family):
    """Of tables, and a norm of the model's own: ONNX knows no other operations."""
    pytest.importorskip("onnxscript")
    model = build(family)
    with extend(model, "yarn", factor=4.0):
        program = torch.onnx.export(Logits(model), (IDS,), dynamo=True, verbose=False)
        (got,) = program.call_reference(IDS)
        torch.testing.assert_close(torch.as_tensor(got), logits(model, IDS), rtol=1e-4, atol=1e-4)
    assert {node.domain for node in program.model.graph} == {""}


@pytest.mark.thorough
def test_onnx_of_a_score_method_is_told_of():
    pytest.importorskip("onnxscript")
    model = build("llama")
    with (
        extend(model, "rerope", window=7),
        pytest.warns(
            UserWarning, match="under rerope cannot be exported to ONNX, which has no such"
        ),
        pytest.raises(torch.onnx.errors.OnnxExporterError),
    ):
        torch.onnx.export(Logits(model), (IDS,), dynamo=True, verbose=False)


def test_a_frequency_method_needs_no_weights():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(build("llama").config)
    with extend(model, "yarn", factor=4.0):
        assert model(IDS.to("meta")).logits.shape == (1, 40, 128)
