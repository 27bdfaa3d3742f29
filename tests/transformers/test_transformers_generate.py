"""`generate` on extended models: the cache, and methods that are frozen per request."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hf_models import (
    CACHE,
    FAMILIES,
    TRAINED,
    CountRotations,
    assert_same,
    build,
    error,
    exact,
    logits,
    one_thread,  # noqa: F401
    rotary_dim,
    since,
    tokens,
    transformers,
)

from extrope_kernels import methods
from extrope_kernels.integrations.transformers import extend

NEW = 10
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
PROMPT = tokens(2, TRAINED - 4)


def _parameters(method: str, family: str = "llama") -> dict:
    if method == "dynamic_yarn":
        return {}
    if method != "longrope":
        return {"factor": 2.0}
    pairs = rotary_dim(family) // 2
    return {"short_factor": [1.0] * pairs, "long_factor": [3.0] * pairs, "factor": 2.0}


def generate(model, ids, **settings):
    """Return the new tokens' logits: (batch, new tokens, vocab)."""
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    if not settings.keys() & {"max_length", "generation_config"}:
        settings["max_new_tokens"] = NEW
    output = model.generate(
        ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        do_sample=False,
        **settings,
    )
    return torch.stack(output.logits, 1)


@pytest.mark.parametrize("method", ["yarn", "xpos", "dynamic_ntk", "dynamic_yarn", "longrope"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_equals_no_cache(family, method):
    model = build(family).double()
    parameters = {} if method == "xpos" else _parameters(method, family)
    with extend(model, method, **parameters):
        assert_same(generate(model, PROMPT), generate(model, PROMPT, use_cache=False))


@pytest.mark.parametrize("method", ["dynamic_ntk", "dynamic_yarn", "longrope"])
def test_a_request_is_frozen_at_the_length_it_will_reach(method):
    model = build("llama").double()
    parameters = _parameters(method)
    with extend(model, method, **parameters):
        got = generate(model, PROMPT)
        by_length = generate(model, PROMPT, max_length=TRAINED - 4 + NEW)
        config = transformers.GenerationConfig(max_new_tokens=NEW)
        by_config = generate(model, PROMPT, generation_config=config)
    with extend(model, method, seq_len=TRAINED - 4 + NEW, **parameters):
        want = generate(model, PROMPT)
    with extend(model, method, seq_len=TRAINED - 4, **parameters):
        assert error(generate(model, PROMPT), want) > 0.1
    for logits_of_new in (got, by_length, by_config):
        assert torch.equal(logits_of_new, want)


def test_a_request_without_a_limit_is_frozen_at_its_prompt():
    model = build("llama", max_position_embeddings=4 * TRAINED).double()
    settings = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False}
    trained = {"max_position_embeddings": TRAINED // 2}
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=PROMPT.shape[1], **trained):
        want = model.generate(PROMPT, **settings)
    with extend(model, "dynamic_ntk", factor=2.0, **trained):
        assert torch.equal(model.generate(PROMPT, **settings), want)
        assert torch.equal(model.generate(PROMPT, **settings, use_cache=False), want)


@pytest.mark.parametrize("method", ["dynamic_ntk", "dynamic_yarn", "longrope"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_requests_do_not_influence_one_another(method, use_cache):
    model, short = build("llama").double(), tokens(1, 6, seed=2)
    with extend(model, method, **_parameters(method)):
        alone = generate(model, short, use_cache=use_cache)
        generate(model, PROMPT, use_cache=use_cache)
        assert torch.equal(generate(model, short, use_cache=use_cache), alone)
        forward = logits(model, short)
        logits(model, PROMPT.repeat(1, 2))
        assert torch.equal(logits(model, short), forward)
    plain = build("llama").double()
    with extend(plain, "longrope" if method == "longrope" else "rope", **_fixed(method)):
        assert torch.equal(generate(plain, short, use_cache=use_cache), alone)


def _fixed(method):
    return {"seq_len": 16, **_parameters(method)} if method == "longrope" else {}


@torch.no_grad()
def test_interleaved_requests_by_hand_keep_their_own_frequencies():
    model, long, short = build("llama").double(), tokens(1, 50, seed=3), tokens(1, 9, seed=4)
    with extend(model, "dynamic_ntk", factor=2.0):
        caches = {ids: model(ids[:, :-2])[CACHE] for ids in (long, short)}
        caches[long], twin = copy.deepcopy(caches[long]), caches[long]
        steps = {ids: [] for ids in (long, short)}
        for step in (-2, -1):
            for ids in (long, short):
                token = ids[:, step : ids.shape[1] + step + 1]
                steps[ids].append(model(token, **{CACHE: caches[ids]}).logits)
        assert torch.equal(model(long[:, -2:-1], **{CACHE: twin}).logits, steps[long][0])
    for ids in (long, short):
        length = ids.shape[1] - 2
        with extend(model, "dynamic_ntk", factor=2.0, seq_len=length):
            torch.testing.assert_close(torch.cat(steps[ids], 1), logits(model, ids)[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("static", [True, False])
def test_an_emptied_cache_starts_a_new_request(static):
    model, long, short = build("llama").double(), tokens(1, 50, seed=3), tokens(1, 9, seed=4)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    else:
        cache = transformers.DynamicCache(config=model.config)
    with extend(model, "dynamic_ntk", factor=2.0):
        model(long, **{CACHE: cache})
        got = model(long[:, :1], **{CACHE: cache}).logits
        with extend(model, "dynamic_ntk", factor=2.0, seq_len=50):
            want = logits(model, torch.cat((long, long[:, :1]), 1))[:, -1:]
        torch.testing.assert_close(got, want)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("before transformers 5.18 an emptied DynamicCache keeps its length")
        torch.testing.assert_close(model(short, **{CACHE: cache}).logits, logits(model, short))


@torch.no_grad()
def test_generate_continues_a_filled_cache():
    model = build("llama").double()
    with extend(model, "dynamic_ntk", factor=2.0):
        cache = model(PROMPT[:, :-1])[CACHE]
        got = generate(model, PROMPT, **{CACHE: cache})
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=PROMPT.shape[1] - 1):
        assert_same(got, generate(model, PROMPT))


def test_explicit_positions_give_the_length_of_a_forward():
    model, ids = build("llama").double(), tokens(1, 8)
    positions = torch.arange(40, 48)[None]
    with extend(model, "dynamic_ntk", factor=2.0):
        got = logits(model, ids, position_ids=positions)
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=48):
        assert torch.equal(logits(model, ids, position_ids=positions), got)


@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_left_padded_prompts_generate_as_alone(family, method):
    model, ids = build(family).double(), PROMPT.clone()
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    with extend(model, method, factor=2.0):
        padded = generate(model, ids, attention_mask=mask)
        both_alone = [generate(model, PROMPT[:1, 5:]), generate(model, PROMPT[1:])]
    # The longest row decides in a batch: here both rows reach past the trained length.
    if method == "dynamic_ntk":
        length = {"seq_len": PROMPT.shape[1] + NEW}
        with extend(model, method, factor=2.0, **length):
            both_alone[0] = generate(model, PROMPT[:1, 5:])
    assert_same(padded, torch.cat(both_alone))


@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"prefill_chunk_size": 8}, {"cache_implementation": "static"}]
)
def test_other_ways_to_generate(method, settings):
    since("5.3", "chunks of a prompt are not generated from")
    model = build("llama").double()
    length = PROMPT.shape[1] + NEW
    with extend(model, method, factor=2.0):
        got = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **settings)
    fixed = {"seq_len": length} if method == "dynamic_ntk" else {}
    with extend(model, method, factor=2.0, **fixed):
        beams = {"num_beams": settings.get("num_beams", 1)}
        want = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **beams)
    assert torch.equal(got, want)


def test_one_rotation_a_layer_and_token():
    model = build("llama").double()
    with extend(model, "dynamic_ntk", factor=2.0), CountRotations() as count:
        generate(model, PROMPT)
    assert count.rotations == NEW * model.config.num_hidden_layers
    assert count.tables == 0


def test_cached_logits_are_those_of_the_exact_model():
    model = build("llama").double()
    length = PROMPT.shape[1] + NEW
    freqs = methods.dynamic_ntk(16, factor=2.0, seq_len=length, max_position_embeddings=TRAINED)
    with extend(model, "dynamic_ntk", factor=2.0):
        got = generate(model, PROMPT)
    ids = torch.cat((PROMPT, got.argmax(-1)[:, :-1]), 1)
    want = logits(exact(model, freqs), ids)[:, -NEW:]
    torch.testing.assert_close(got, want.float())  # generate returns float32


@pytest.mark.parametrize(
    "method, parameters", [("yarn", {"factor": 4.0}), ("rerope", {"window": 8})]
)
def test_threads_on_one_model(method, parameters):
    """Each has its own forward in progress; Qwen3's norms, too."""
    model = build("qwen3", hidden_size=256, num_hidden_layers=4)
    prompts = [[tokens(1, length, seed) for seed in range(60)] for length in (40, 66)]
    with extend(model, method, **parameters), ThreadPoolExecutor(2) as pool:
        want = [[logits(model, ids) for ids in part] for part in prompts]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            got = list(pool.map(lambda part: [logits(model, ids) for ids in part], prompts))
        finally:
            sys.setswitchinterval(interval)
    torch.testing.assert_close(got, want)
