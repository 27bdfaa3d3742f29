"""Models as they are loaded and wrapped: default dtypes, offloaded weights, torch.compile."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from hf_models import (
    build,
    generate,
    logits,
    one_thread,  # noqa: F401
    tokens,
    transformers,
)
from torch import nn

from extrope_kernels.integrations.transformers import extend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "method, parameters", [("yarn", {"factor": 4.0}), ("rerope", {"window": 6})]
)
def test_default_dtypes_are_not_those_of_trials(method, parameters, dtype):
    model, ids = build("qwen3"), tokens(1, 20)
    with extend(model, method, **parameters):
        want = logits(model, ids)
    torch.set_default_dtype(dtype)
    try:
        with extend(model, method, **parameters):
            got = logits(model, ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_offloaded_embeddings():
    """accelerate's weights are on meta between forwards."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = build("llama"), tokens(1, 20)
    with extend(model, "rerope", window=6):
        want = logits(model, ids)
    accelerate.cpu_offload(model, "cpu")
    with extend(model, "rerope", window=6):
        assert torch.equal(logits(model, ids), want)


def test_a_wrapper_extends_the_model_in_it():
    """However the wrapper is called, or taken off, a request's length is known."""
    ids, parameters = tokens(1, 20), {"factor": 4.0, "max_position_embeddings": 8}
    model = build("llama")
    with extend(model, "dynamic_ntk", **parameters):
        want = generate(model, ids, max_new_tokens=6)
    wrapper = torch.compile(model, backend="eager")
    with extend(wrapper, "dynamic_ntk", **parameters):
        for outside in (wrapper, model):
            torch.testing.assert_close(generate(outside, ids, max_new_tokens=6), want)


class Wrapper(nn.Module):
    """Knows nothing of transformers, and calls something else its config."""

    def __init__(self, *parts):
        super().__init__()
        self.config = {"parts": len(parts)}
        self.parts = nn.ModuleList(parts)


def test_a_wrapper_with_an_encoder_before_the_model():
    ids, parameters = tokens(1, 20), {"factor": 4.0, "max_position_embeddings": 8}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=8))
    model = build("llama")
    with extend(model, "dynamic_ntk", **parameters):
        want = generate(model, ids, max_new_tokens=6)
    with extend(Wrapper(encoder, model), "dynamic_ntk", **parameters):
        assert torch.equal(generate(model, ids, max_new_tokens=6), want)


@torch.no_grad()
def test_a_wrapper_leaves_the_vision_tower_alone():
    model, ids = tiny_models.build("Mistral3ForConditionalGeneration"), tokens(1, 20)
    generator = torch.Generator().manual_seed(1)
    image = {
        "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([[32, 32]]),
    }
    seen = model.model.vision_tower(**image).last_hidden_state
    with extend(model, "pi", factor=4.0):
        want = logits(model, ids)
    with extend(Wrapper(model), "pi", factor=4.0):
        assert torch.equal(logits(model, ids), want)
        assert torch.equal(model.model.vision_tower(**image).last_hidden_state, seen)
