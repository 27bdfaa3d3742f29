"""`generate` and caches of models extended by a score method."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import (
    ATTENDING,
    CACHE,
    LAYERS,
    SCORE_PARAMETERS,
    assert_as_exact_as,
    assert_same,
    build,
    error,
    generate,
    logits,
    one_thread,  # noqa: F401
    since,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from extrope_kernels.integrations.transformers import extend

NEW = 6
PROMPT = tokens(2, 27)
PAD = 5
LOG_N = ("leaky_rerope", "dual_chunk", "blockwise_causal")
METHODS = {
    method: parameters | ({"log_n": 16} if method in LOG_N else {})
    for method, parameters in SCORE_PARAMETERS.items()
}
ALL = [
    *(("llama", method) for method in METHODS),
    ("gemma2", "rerope"),  # sliding window layers in between
    ("gemma3_text", "leaky_rerope"),
    ("phi", "self_extend"),
    ("gpt_neox", "dual_chunk"),
    ("phi", "blockwise_causal"),
    ("gemma3_text", "string"),
    ("cohere", "leaky_rerope"),
]


class CountDecodes(TorchDispatchMode):
    """Counts the calls of the op for a cache inside a `with` block."""

    decodes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.decodes += func is torch.ops.extrope.decode.default
        return func(*args, **(kwargs or {}))


def model_of(family):
    return build(family, **ATTENDING[family]).double()


def run(model, ids, **settings):
    return generate(model, ids, max_new_tokens=NEW, **settings)


@pytest.mark.parametrize(("family", "method"), ALL)
def test_cache_equals_no_cache(family, method):
    model = model_of(family)
    plain = run(model, PROMPT)
    with extend(model, method, **METHODS[method]):
        want = run(model, PROMPT, use_cache=False)
        assert_same(run(model, PROMPT), want)
    assert error(want, plain) > 0.01


@pytest.mark.parametrize(("family", "method"), ALL)
def test_cached_logits_in_float32_are_as_exact_as_others(family, method):
    model = model_of(family).float()
    with extend(model, method, **METHODS[method]):
        got = run(model, PROMPT)
        ids = torch.cat((PROMPT, got.argmax(-1)[:, :-1]), 1)
        expected = logits(model, ids)[:, -NEW:]
        want = logits(model.double(), ids)[:, -NEW:]
    assert_as_exact_as(got, expected, want)


@pytest.mark.parametrize(("family", "method"), ALL)
def test_left_padded_prompts_generate_as_alone(family, method):
    model, ids = model_of(family), PROMPT.clone()
    mask = torch.ones_like(ids)
    ids[0, :PAD] = mask[0, :PAD] = 0
    with extend(model, method, **METHODS[method]):
        want = torch.cat((run(model, PROMPT[:1, PAD:]), run(model, PROMPT[1:])))
        for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
            if "prefill_chunk_size" in settings:
                since("5.1", "chunks of a prompt are not generated from")
            assert_same(run(model, ids, attention_mask=mask, **settings), want)


@pytest.mark.parametrize("method", METHODS)
def test_one_decode_a_layer_and_token(method):
    model = model_of("llama").float()
    with extend(model, method, **METHODS[method]), CountDecodes() as count:
        run(model, PROMPT)
    assert count.decodes == (NEW - 1) * LAYERS  # the first token comes with the prompt


@pytest.mark.parametrize("method", ["dual_chunk", "blockwise_causal"])
def test_a_cache_of_keys_with_the_decay_of_xpos(method):
    model = model_of("llama")
    with extend(model, "xpos"), extend(model, method, **METHODS[method]):
        assert_same(run(model, PROMPT), run(model, PROMPT, use_cache=False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "prefill_chunk_size": 8},
        {"prefill_chunk_size": 8, "cache_implementation": "static"},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_other_ways_to_generate(method, settings):
    """The second prompt is padded."""
    since("5.3", "chunks of a prompt are not generated from")
    model, ids = model_of("llama"), PROMPT.clone()
    ids[1, :PAD] = 0
    plain = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": (ids != 0).long()}
    with extend(model, method, **METHODS[method]):
        got = model.generate(ids, **plain, **settings)
        want = model.generate(ids, **plain, use_cache=False, num_beams=settings.get("num_beams", 1))
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_several_tokens_at_once_and_some_taken_back(method):
    since("5.14", "candidates need a token that ends a text")
    model, prompt = model_of("llama"), PROMPT[:1, :9].repeat(1, 3)
    plain = {"max_new_tokens": NEW, "do_sample": False}
    with extend(model, method, **METHODS[method]):
        got = model.generate(prompt, **plain, prompt_lookup_num_tokens=3)
        assert torch.equal(got, model.generate(prompt, **plain))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_static_caches_with_and_without_sliding_windows(family):
    model = model_of(family)
    with extend(model, "rerope", window=7):
        got = run(model, PROMPT, cache_implementation="static")
        assert_same(got, run(model, PROMPT))


@torch.no_grad()
def test_a_cache_serves_the_method_that_filled_it_alone():
    model, ids = model_of("llama"), PROMPT[:1]
    plain_cache = model(ids[:, :-1])[CACHE]
    with extend(model, "leaky_rerope", window=7, factor=4.0):
        with pytest.raises(ValueError, match="extend: cache must have been filled under leaky_re"):
            model(ids[:, -1:], **{CACHE: plain_cache})
        cache = model(ids[:, :-1])[CACHE]
    with extend(model, "leaky_rerope", window=7, factor=2.0), pytest.raises(ValueError):
        model(ids[:, -1:], **{CACHE: copy.deepcopy(cache)})
    with extend(model, "leaky_rerope", window=9, factor=4.0):
        # The window is no part of where keys lie.
        assert model(ids[:, -1:], **{CACHE: copy.deepcopy(cache)}).logits.isfinite().all()
    with extend(model, "leaky_rerope", window=7, factor=4.0):
        cache.crop(5 - cache.get_seq_length())
        got = model(ids[:, 5:], **{CACHE: cache}).logits
        torch.testing.assert_close(got, logits(model, ids)[:, 5:])


def test_refuses_rows_that_have_no_beginning():
    model, mask = model_of("llama"), torch.ones_like(PROMPT)
    mask[0, 9] = 0
    positions = torch.arange(27)[None] + 1
    four = torch.ones(2, 1, 27, 27, dtype=torch.bool)
    with extend(model, "rerope", window=7):
        for inputs, message in (
            ({"attention_mask": mask}, "got padding between tokens; pad on the left"),
            ({"attention_mask": mask[:, 1:]}, r"attention_mask must be \(2, 27\), cached tok"),
            ({"attention_mask": four}, "attention_mask must be causal, got one in which"),
            ({"position_ids": positions}, "position_ids must count 0, 1, 2, ... from each row's"),
            ({"output_attentions": True}, "output_attentions must be False"),
        ):
            with pytest.raises(ValueError, match="^extend: .*" + message):
                logits(model, PROMPT, **inputs)
