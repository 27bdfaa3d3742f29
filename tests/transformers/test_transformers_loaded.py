"""Models as they are loaded and wrapped: default dtypes, offloaded weights, torch.compile."""

from __future__ import annotations

import pytest
import torch
from hf_models import (
    build,
    generate,
    logits,
    one_thread,  # noqa: F401
    tokens,
)

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
