"""`generate` on extended models: caches, padding, and methods that are frozen per request."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import hf_models, tiny_models
from support.hf_models import (
    ATTENDING,
    CACHE,
    LAYERS,
    SCORE_PARAMETERS,
    TRAINED,
    CountOps,
    assert_as_exact_as,
    assert_same,
    build,
    error,
    logits,
    since,
    tokens,
    transformers,
)
from torch._dynamo.utils import counters

from extrope_kernels.integrations.transformers import extend

NEW = 8
PAD = 5
PROMPT = tokens(2, TRAINED - 4)
PADDED, MASK = PROMPT.clone(), torch.ones_like(PROMPT)
PADDED[0, :PAD] = MASK[0, :PAD] = 0
BY_LENGTH = {
    "dynamic_ntk": {"factor": 2.0},
    "dynamic_yarn": {},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 2.0},
}
LOG_N = ("leaky_rerope", "dual_chunk", "blockwise_causal")
SCORES = {
    method: parameters | ({"log_n": 16} if method in LOG_N else {})
    for method, parameters in SCORE_PARAMETERS.items()
}
METHODS = {"yarn": {"factor": 2.0}, "xpos": {}} | BY_LENGTH | SCORES


def model_of(family, **sizes):
    return build(family, **ATTENDING[family], **sizes).double()


def generate(model, ids, **settings):
    """Return the new tokens' logits: (batch, new tokens, vocab)."""
    if not settings.keys() & {"max_length", "generation_config"}:
        settings["max_new_tokens"] = NEW
    return hf_models.generate(model, ids, **settings)


@pytest.mark.parametrize("method", ["xpos", "dynamic_yarn", "longrope"])  # others: padded, below
def test_cache_equals_no_cache(method):
    model = model_of("llama")
    plain = generate(model, PROMPT)
    with extend(model, method, **METHODS[method]):
        want = generate(model, PROMPT, use_cache=False)
        assert_same(generate(model, PROMPT), want)
    assert error(want, plain) > 0.01


@pytest.mark.parametrize("method", SCORES)
def test_a_cache_in_float32_is_as_exact_as_none(method):
    model = build("llama")
    with extend(model, method, **SCORES[method]):
        got = generate(model, PROMPT)
        ids = torch.cat((PROMPT, got.argmax(-1)[:, :-1]), 1)
        expected = logits(model, ids)[:, -NEW:]
        assert_as_exact_as(got, expected, logits(model.double(), ids)[:, -NEW:])


WAYS = [
    {},
    {"use_cache": False},
    {"prefill_chunk_size": 4},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "prefill_chunk_size": 8},
]
SEARCHED = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False, "attention_mask": MASK}


@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk", *SCORES])
def test_left_padded_prompts_generate_as_alone_in_every_way(method):
    """One method of each kind in all ways, the others without a cache and in a static one's pieces.

    Beams in whatever way, of them all.
    """
    since("5.3", "chunks of a prompt are not generated from")
    model = model_of("llama")
    every_way = method in ("dynamic_ntk", "self_extend")
    with extend(model, method, **METHODS[method]):
        alone = torch.cat((generate(model, PROMPT[:1, PAD:]), generate(model, PROMPT[1:])))
        for settings in WAYS if every_way else (WAYS[1], WAYS[-1]):
            assert_same(generate(model, PADDED, attention_mask=MASK, **settings), alone)
        want = model.generate(PADDED, use_cache=False, **SEARCHED)
        for settings in ({}, {"prefill_chunk_size": 8}):
            assert torch.equal(model.generate(PADDED, **SEARCHED, **settings), want), settings


@pytest.mark.parametrize("method", SCORES)
def test_several_tokens_at_once_and_some_taken_back(method):
    since("5.14", "candidates need a token that ends a text")
    model, prompt = model_of("llama"), PROMPT[:1, :9].repeat(1, 3)
    plain = {"max_new_tokens": NEW, "do_sample": False}
    with extend(model, method, **SCORES[method]):
        got = model.generate(prompt, **plain, prompt_lookup_num_tokens=3)
        assert torch.equal(got, model.generate(prompt, **plain))


def test_static_caches_of_layers_with_a_sliding_window():
    model = model_of("gemma2")
    with extend(model, "rerope", window=7):
        want = generate(model, PROMPT, use_cache=False)
        for settings in ({}, {"cache_implementation": "static"}):
            assert_same(generate(model, PROMPT, **settings), want)


def test_one_op_a_layer_and_token():
    model = model_of("llama")
    with extend(model, "dynamic_ntk", factor=2.0), CountOps() as count:
        generate(model, PROMPT)
    assert (count.rotations, count.tables) == (NEW * LAYERS, 0)
    with extend(model.float(), "leaky_rerope", window=7, factor=3.5), CountOps() as count:
        generate(model, PROMPT)
    assert count.of("extrope.decode") == (NEW - 1) * LAYERS  # the first token comes with the prompt


@pytest.mark.parametrize("method", ["dual_chunk", "blockwise_causal"])
def test_a_cache_of_keys_with_the_decay_of_xpos(method):
    model = model_of("llama")
    with extend(model, "xpos"), extend(model, method, **SCORES[method]):
        assert_same(generate(model, PROMPT), generate(model, PROMPT, use_cache=False))


@torch.no_grad()
def test_a_cache_serves_every_score_method():
    """Its keys are where the model has them. Of one layer, whose keys depend on tokens alone."""
    model, ids = build("llama", num_hidden_layers=1).double(), PROMPT[:1]
    filled = model(ids[:, :-1])[CACHE]
    for parameters in ({"window": 7, "factor": 4.0}, {"window": 9, "factor": 2.0}):
        with extend(model, "leaky_rerope", **parameters):
            got = model(ids[:, -1:], **{CACHE: copy.deepcopy(filled)}).logits
            # The plain model rounds its angles to float32.
            torch.testing.assert_close(got, logits(model, ids)[:, -1:], atol=1e-5, rtol=0)
            cache = model(ids[:, :-1])[CACHE]
            cache.crop(5 - cache.get_seq_length())
            got = model(ids[:, 5:], **{CACHE: cache}).logits
            torch.testing.assert_close(got, logits(model, ids)[:, 5:])


@pytest.mark.parametrize("method", BY_LENGTH)
def test_a_request_is_frozen_at_the_length_it_will_reach(method):
    model, length = model_of("llama"), PROMPT.shape[1] + NEW
    config = transformers.GenerationConfig(max_new_tokens=NEW)
    with extend(model, method, **BY_LENGTH[method]):
        got = [
            generate(model, PROMPT, **settings)
            for settings in (
                {},
                {"attention_mask": None},
                {"max_length": length},
                {"generation_config": config},
            )
        ]
    with extend(model, method, seq_len=length, **BY_LENGTH[method]):
        want = generate(model, PROMPT)
    with extend(model, method, seq_len=TRAINED - 4, **BY_LENGTH[method]):
        assert error(generate(model, PROMPT), want) > 0.1
    assert all(torch.equal(each, want) for each in got)


def test_a_prompt_of_embeddings_beside_no_ids():
    model = model_of("llama")
    embeds = {"inputs_embeds": model.get_input_embeddings()(PROMPT).detach()}
    with extend(model, "dynamic_ntk", factor=2.0):
        got = generate(model, PROMPT[:, :0], attention_mask=torch.ones_like(PROMPT), **embeds)
        assert_same(got, generate(model, PROMPT))


def test_a_request_without_a_limit_is_frozen_at_its_prompt():
    model = model_of("llama", max_position_embeddings=4 * TRAINED)
    settings = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False}
    trained = {"max_position_embeddings": TRAINED // 2}
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=PROMPT.shape[1], **trained):
        want = model.generate(PROMPT, **settings)
    with extend(model, "dynamic_ntk", factor=2.0, **trained):
        assert torch.equal(model.generate(PROMPT, **settings), want)
        assert torch.equal(model.generate(PROMPT, **settings, use_cache=False), want)


@pytest.mark.parametrize(
    ("method", "use_cache"), [*((method, True) for method in BY_LENGTH), ("dynamic_ntk", False)]
)
def test_requests_do_not_influence_one_another(method, use_cache):
    model, short = model_of("llama"), tokens(1, 6, seed=2)
    with extend(model, method, **BY_LENGTH[method]):
        alone = generate(model, short, use_cache=use_cache)
        generate(model, PROMPT, use_cache=use_cache)
        assert torch.equal(generate(model, short, use_cache=use_cache), alone)
        forward = logits(model, short)
        logits(model, PROMPT.repeat(1, 2))
        assert torch.equal(logits(model, short), forward)
    within = {"seq_len": 16, **BY_LENGTH[method]} if method == "longrope" else {}
    with extend(model, method if within else "rope", **within):
        assert torch.equal(generate(model, short, use_cache=use_cache), alone)


ROWS = (9, 50)  # tokens of two rows, of a model trained to 32


def padded_rows(side):
    """Two rows of other lengths in one batch: ids, mask, and where each row's tokens are."""
    ids, mask = torch.zeros(2, max(ROWS), dtype=torch.int64), torch.zeros(2, max(ROWS)).long()
    places = [slice(max(ROWS) - n, None) if side == "left" else slice(0, n) for n in ROWS]
    for row, (length, place) in enumerate(zip(ROWS, places, strict=True)):
        ids[row, place], mask[row, place] = tokens(1, length, seed=row), 1
    return ids, mask, places


@torch.no_grad()
def test_rows_of_a_batch_have_their_own_lengths():
    model = model_of("llama")
    with extend(model, "dynamic_ntk", factor=2.0):
        for side in ("left", "right"):
            ids, mask, places = padded_rows(side)
            got = logits(model, ids, attention_mask=mask)
            for row, place in enumerate(places):
                alone = logits(model, ids[row : row + 1, place])
                torch.testing.assert_close(got[row : row + 1, place], alone)
        ids, mask, places = padded_rows("left")
        got = generate(model, ids, attention_mask=mask)
        for row, place in enumerate(places):
            alone = generate(model, ids[row : row + 1, place])
            torch.testing.assert_close(got[row : row + 1], alone)


@torch.no_grad()
def test_rows_that_need_other_amplitudes_are_refused():
    model, (ids, mask, _) = model_of("llama"), padded_rows("left")
    message = "must have rows and packed sequences of one length in a batch, got 9 and 50 tokens"
    packed = torch.cat([torch.arange(n) for n in ROWS])[None]
    for cache, method in ((None, "dynamic_yarn"), ("raw", "dynamic_ntk")):
        given = {"factor": 2.0} if method == "dynamic_ntk" else {}
        with extend(model, method, cache=cache, **given):
            with pytest.raises(ValueError, match=f"extend: {method} {message}"):
                logits(model, ids, attention_mask=mask)
            short = torch.ones(2, 20).long()
            short[1, :9] = 0  # all of it as it was trained
            logits(model, ids[:, -20:], attention_mask=short)
    with extend(model, "dynamic_ntk", factor=2.0):
        with pytest.raises(ValueError, match=message):
            logits(model, tokens(1, sum(ROWS)), position_ids=packed)
        with extend(model, "rerope", window=16), pytest.raises(ValueError, match=message):
            logits(model, ids, attention_mask=mask)


@torch.no_grad()
def test_interleaved_requests_by_hand_keep_their_own_frequencies():
    model, long, short = model_of("llama"), tokens(1, 50, seed=3), tokens(1, 9, seed=4)
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
    model, long, short = model_of("llama"), tokens(1, 50, seed=3), tokens(1, 9, seed=4)
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
def test_a_cache_whose_first_layer_holds_no_tokens():
    """MiniMax's has states."""
    model, ids = tiny_models.build("MiniMaxForCausalLM"), tokens(1, 82).clamp(max=99)
    at = torch.arange(82)[None]
    with extend(model, "dynamic_ntk", factor=2.0):
        cache = model(ids[:, :80], position_ids=at[:, :80])[CACHE]
        for step in (80, 81):
            inputs = {"position_ids": at[:, step : step + 1], CACHE: cache}
            got = model(ids[:, step : step + 1], **inputs).logits
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=80):
        torch.testing.assert_close(got, logits(model, ids)[:, -1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_continues_a_filled_cache():
    model = model_of("llama")
    with extend(model, "dynamic_ntk", factor=2.0):
        cache = model(PROMPT[:, :-1])[CACHE]
        got = generate(model, PROMPT, **{CACHE: cache})
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=PROMPT.shape[1] - 1):
        assert_same(got, generate(model, PROMPT))


def test_explicit_positions_give_the_length_of_a_forward():
    model, ids = model_of("llama"), tokens(1, 8)
    positions = torch.arange(40, 48)[None]
    with extend(model, "dynamic_ntk", factor=2.0):
        got = logits(model, ids, position_ids=positions)
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=48):
        assert torch.equal(logits(model, ids, position_ids=positions), got)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "method, parameters",
    [("yarn", {"factor": 4.0}), ("dynamic_ntk", {"factor": 4.0}), ("rerope", {"window": 8})],
)
def test_threads_on_one_model(method, parameters):
    """Each has its own forward in progress, and its length."""
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


@pytest.fixture
def graphs():
    """Returns how many graphs were made in this test."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def compiled(model, backend="eager"):
    """Generate through transformers' own graph of a step; AOTAutograd takes as long again."""
    config = transformers.CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config}
    return generate(model, PADDED, attention_mask=MASK, **settings)


@pytest.mark.parametrize(
    ("family", "method", "parameters", "compiler"),
    [
        pytest.param("cohere", "yarn", {"factor": 4.0}, "eager", marks=pytest.mark.thorough),
        *(
            pytest.param("llama", "rerope", {"window": 16, "log_n": 16}, compiler, marks=marks)
            for compiler, marks in (("eager", ()), ("aot_eager", pytest.mark.thorough))
        ),
    ],
)
def test_a_compiled_step_gives_what_a_dynamic_cache_gives(
    graphs, family, method, parameters, compiler
):
    """And its graph is not mistaken for that of the restored model."""
    model = model_of(family, num_hidden_layers=1)
    plain = generate(model, PADDED, attention_mask=MASK)
    with extend(model, method, **parameters):
        want = generate(model, PADDED, attention_mask=MASK)
        assert_same(compiled(model, compiler), want)
    assert graphs() == 1
    if method == "rerope":
        assert not torch.equal(want.argmax(-1), plain.argmax(-1))
        assert torch.equal(compiled(model).argmax(-1), plain.argmax(-1))


@pytest.mark.thorough
def test_a_compiled_step_beside_layers_with_a_sliding_window(graphs):
    """Their cache counts in Python, so that the second step is traced again, as in any model."""
    model = build("gemma3_text", sliding_window=8, tie_word_embeddings=False)
    with extend(model, "leaky_rerope", **SCORE_PARAMETERS["leaky_rerope"]):
        want = generate(model, PADDED, attention_mask=MASK)
        assert torch.equal(compiled(model).argmax(-1), want.argmax(-1))
    assert graphs() == 2


@torch.no_grad()
def test_requests_of_any_length_share_a_graph(graphs):
    """The frequencies of each are those that its prompt has chosen."""
    model = model_of("llama", num_hidden_layers=1)
    with extend(model, "dynamic_ntk", factor=2.0), extend(model, "rerope", window=16):
        step = torch.compile(model.__call__, backend="eager", fullgraph=True)
        for seqlen in (40, 60, 50):
            ids = tokens(1, seqlen, seed=seqlen)
            found = []
            for forward in (model, step):
                cache = transformers.StaticCache(model.config, max_cache_len=64)
                model(ids[:, :-2], **{CACHE: cache})
                steps = [torch.tensor([[token]]) for token in ids[0, -2:].tolist()]
                found.append([forward(token, **{CACHE: cache}).logits for token in steps])
            for want, got in zip(*found):
                torch.testing.assert_close(got, want)
    assert graphs() == 1
