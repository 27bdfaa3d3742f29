"""Static caches and `torch.compile` of the decode step, of extended models."""

from __future__ import annotations

import pytest
import torch
from hf_models import (
    CACHE,
    SCORE_PARAMETERS,
    assert_same,
    build,
    generate,
    one_thread,  # noqa: F401
    tokens,
    transformers,
)
from torch._dynamo.utils import counters

from extrope_kernels.integrations.transformers import extend

NEW = 6
PROMPT = tokens(2, 27)
MASK = torch.ones_like(PROMPT)
MASK[0, :5] = 0
CASES = [
    ("cohere", "yarn", {"factor": 4.0}),
    ("llama", "rerope", {"window": 16, "log_n": 16}),
]


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()


def run(model, **settings):
    return generate(model, PROMPT, attention_mask=MASK, max_new_tokens=NEW, **settings)


def compiled(model, backend="eager"):
    """The same through transformers' own graph of a step."""
    config = transformers.CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return run(model, cache_implementation="static", compile_config=config)


def graphs():
    """How many were made in this test."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("family", "method", "parameters"), CASES)
def test_a_compiled_step_gives_what_a_dynamic_cache_gives(family, method, parameters):
    model = build(family, num_hidden_layers=1).double()
    with extend(model, method, **parameters):
        want = run(model)
        assert_same(run(model, cache_implementation="static"), want)
        assert_same(compiled(model, "aot_eager"), want)
    assert graphs() == 1


def test_a_compiled_step_beside_layers_with_a_sliding_window():
    """Their cache counts in Python, so that the second step is traced again, as in any model."""
    model = build("gemma3_text", sliding_window=8, tie_word_embeddings=False)
    with extend(model, "leaky_rerope", **SCORE_PARAMETERS["leaky_rerope"]):
        assert torch.equal(compiled(model).argmax(-1), run(model).argmax(-1))
    assert graphs() == 2


def test_the_graph_of_an_extended_model_is_not_taken_for_the_restored_one():
    model = build("llama", num_hidden_layers=1)
    plain = run(model)
    with extend(model, "rerope", window=8):
        got = compiled(model)
        assert torch.equal(got.argmax(-1), run(model).argmax(-1))
    assert not torch.equal(got.argmax(-1), plain.argmax(-1))
    assert torch.equal(compiled(model).argmax(-1), plain.argmax(-1))


@torch.no_grad()
def test_requests_of_any_length_share_a_graph():
    """The frequencies of each are those that its prompt has chosen."""
    model = build("llama", num_hidden_layers=1).double()
    with extend(model, "dynamic_ntk", factor=2.0), extend(model, "rerope", window=16):
        step = torch.compile(model.__call__, backend="eager", fullgraph=True)
        for seqlen in (40, 60, 50):
            ids = tokens(1, seqlen, seed=seqlen)
            logits = []
            for forward in (model, step):
                cache = transformers.StaticCache(model.config, max_cache_len=64)
                model(ids[:, :-2], **{CACHE: cache})
                steps = [torch.tensor([[token]]) for token in ids[0, -2:].tolist()]
                logits.append([forward(token, **{CACHE: cache}).logits for token in steps])
            for want, got in zip(*logits):
                torch.testing.assert_close(got, want)
    assert graphs() == 1


@torch.no_grad()
def test_a_graph_refuses_the_cache_of_another_extension():
    model = build("llama")
    cache = transformers.StaticCache(model.config, max_cache_len=64)
    with extend(model, "leaky_rerope", window=8, factor=4.0):
        model(PROMPT, **{CACHE: cache})
    step = torch.compile(model.__call__, backend="eager")
    with (
        extend(model, "rerope", window=8),
        pytest.raises(ValueError, match="cache must have been filled under rerope"),
    ):
        step(PROMPT[:, :1], **{CACHE: cache})
