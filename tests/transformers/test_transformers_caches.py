"""Caches that cross `extend` or `restore`: right, or refused by what filled them."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from support.hf_models import CACHE, build, generate, tokens
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from extrope_kernels.integrations.transformers import extend

IDS = tokens(2, 40)
PARAMETERS = {
    "rope": {},
    "pi": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "dynamic_ntk": {"factor": 2.0},
    "rerope": {"window": 9},
    "leaky_rerope": {"window": 9, "factor": 4.0},
}
OTHERS = [
    *(("plain", each) for each in ("yarn", "pi")),
    *((each, "plain") for each in ("yarn", "pi")),
    *(("yarn", "pi"), ("yarn", "rerope"), ("yarn", "dynamic_ntk")),
]
# A score method's keys are where the model has them.
SCORES = [("plain", "rerope"), ("rerope", "plain"), ("rerope", "leaky_rerope")]
SAME = [("plain", "rope"), ("rope", "plain"), ("dynamic_ntk", "plain"), ("yarn", "yarn")]
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


def model_of():
    return build("llama").double().requires_grad_(False)


def under(model, method):
    return nullcontext() if method == "plain" else extend(model, method, **PARAMETERS[method])


def step(model, cache, begin, end):
    return model(IDS[:, begin:end], **{CACHE: cache}).logits


def told(method):
    """In words: a score method's keys are rotated as the plain model's."""
    return "by the plain model" if method in ("plain", "rerope") else f"under {method}"


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("first", "then"), OTHERS)
def test_keys_rotated_otherwise_are_refused(first, then, kind):
    model, cache = model_of(), CACHES[kind](model_of())
    with under(model, first):
        step(model, cache, 0, 30)
    others = copy.deepcopy(cache)
    with under(model, then):
        for each in (cache, others):
            want = f"cache must have been filled {told(then)}.*, got one filled {told(first)}"
            with pytest.raises(ValueError, match=want):
                step(model, each, 30, 40)
    with under(model, first):
        step(model, cache, 30, 40)  # still good where it was filled


def assert_goes_on(model, new_cache, first, then):
    """A cache that `first` filled serves `then`, up to the plain model's rounding of angles."""
    cache, fresh = new_cache(model), new_cache(model)
    with under(model, first):
        step(model, cache, 0, 30)
    with under(model, then):
        step(model, fresh, 0, 30)
        torch.testing.assert_close(
            step(model, cache, 30, 40), step(model, fresh, 30, 40), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("first", "then"), SAME)
def test_keys_rotated_the_same_go_on(first, then, kind):
    assert_goes_on(model_of(), CACHES[kind], first, then)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("first", "then"), SCORES)
def test_keys_of_score_methods_go_on(first, then, kind):
    """Of one layer, whose keys depend on tokens alone."""
    model = build("llama", num_hidden_layers=1).double().requires_grad_(False)
    assert_goes_on(model, CACHES[kind], first, then)


def test_raw_keys_go_on_by_other_frequencies():
    """Of one layer, whose keys depend on tokens alone."""
    model = build("llama", num_hidden_layers=1).double()
    cache, fresh = DynamicCache(), DynamicCache()
    with extend(model, "pi", factor=2.0, cache="raw"):
        step(model, cache, 0, 30)
    with extend(model, "yarn", factor=4.0, cache="raw"):
        step(model, fresh, 0, 30)
        torch.testing.assert_close(step(model, cache, 30, 40), step(model, fresh, 30, 40))
    with pytest.raises(ValueError, match="filled by the plain model, got one filled under yarn"):
        step(model, cache, 30, 40)


@pytest.mark.parametrize("then", ["plain", "pi"])
def test_an_emptied_cache_forgets(then):
    model, cache = model_of(), CACHES["static"](model_of())
    with extend(model, "yarn", factor=4.0):
        step(model, cache, 0, 30)
    cache.reset()
    with under(model, then):
        step(model, cache, 0, 30)
        want = model(IDS, use_cache=False).logits[:, 30:]
        torch.testing.assert_close(step(model, cache, 30, 40), want)


def test_the_cache_of_a_forward_that_failed_is_refused_after_it():
    model, cache = model_of(), DynamicCache()
    with extend(model, "yarn", factor=4.0):
        step(model, cache, 0, 30)
        with pytest.raises(IndexError):
            model(IDS + 1000, **{CACHE: cache})
    with pytest.raises(ValueError, match="got one filled under yarn"):
        step(model, cache, 30, 40)


def test_a_cache_that_a_forward_made():
    model = model_of()
    with extend(model, "yarn", factor=4.0):
        cache = model(IDS[:, :30])[CACHE]
    with pytest.raises(ValueError, match="got one filled under yarn"):
        step(model, cache, 30, 40)
    cache = model(IDS[:, :30])[CACHE]
    with extend(model, "yarn", factor=4.0), pytest.raises(ValueError, match="by the plain model"):
        step(model, cache, 30, 40)


def test_direct_calls_of_forward_look_too():
    model, cache = model_of(), DynamicCache()
    with extend(model, "yarn", factor=4.0):
        for begin, end in ((0, 30), (30, 40)):
            model.model.forward(input_ids=IDS[:, begin:end], **{CACHE: cache})
    with pytest.raises(ValueError, match="got one filled under yarn"):
        model.model.forward(input_ids=IDS, **{CACHE: cache})


def test_generate_keeps_a_static_cache_between_extensions():
    """The model has one, which `generate` resets."""
    model, ways = model_of(), {"cache_implementation": "static", "max_new_tokens": 4}
    for method in ("plain", "yarn", "plain", "pi"):
        with under(model, method):
            got = generate(model, IDS, **ways)
            want = generate(model, IDS, max_new_tokens=4)
            torch.testing.assert_close(got, want)


def test_compiled_steps_look_at_marks():
    """A graph sees a mark; it cannot see if a static cache without one is empty."""
    model, cache = model_of(), CACHES["static"](model_of())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with extend(model, "yarn", factor=4.0):
        step(model, cache, 0, 30)
        want = step(model, copy.deepcopy(cache), 30, 31)
        torch.testing.assert_close(step(compiled, cache, 30, 31), want)
        graphs = counters["stats"]["unique_graphs"]
        step(compiled, cache, 31, 32)
        step(compiled, cache, 32, 33)
        assert counters["stats"]["unique_graphs"] == graphs
    with pytest.raises(Exception, match="got one filled under yarn"):
        step(compiled, cache, 33, 34)
