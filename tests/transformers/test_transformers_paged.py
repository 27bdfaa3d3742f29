"""`generate_batch` of extended models: many requests in one forward, their keys in pages."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import SCORE_PARAMETERS, build, generate, tokens, transformers
from torch import nn

from extrope_kernels.integrations.transformers import extend, paged

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
from transformers.generation.continuous_batching import initialization
from transformers.generation.continuous_batching.cache import PagedAttentionCache

NEW = 4
BATCH_TOKENS = 16  # of one forward: long prompts come in pieces, beside others' new tokens
PAGE = 8
BEGINNING = tokens(1, 20, seed=9)[0].tolist()  # more than two pages, shared by two requests
PROMPTS = [
    *(tokens(1, seqlen, seed=seqlen)[0].tolist() for seqlen in (40, 7, 23)),
    *([*BEGINNING, *end] for end in ((5, 6, 7), (8, 9))),
]
CASES = [
    ("llama", "dynamic_ntk", {"factor": 4.0, "seq_len": 64}),
    ("qwen3", "rerope", {"window": 16, "log_n": 16}),
    ("gemma3_text", "dual_chunk", SCORE_PARAMETERS["dual_chunk"]),
]
LEAKY = SCORE_PARAMETERS["leaky_rerope"]


def batch(model, **settings):
    """The tokens of each request, and their log probabilities."""
    settings = {
        **{"max_batch_tokens": BATCH_TOKENS, "num_blocks": 40, "page_size": PAGE},
        **{"default_compile_level": 0, "return_logprobs": True, **settings},
    }
    persistent = settings.pop("persistent_manager", False)
    outputs = model.generate_batch(
        PROMPTS,
        transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        transformers.ContinuousBatchingConfig(**settings),
        warmup=False,
        persistent_manager=persistent,
    )
    assert all(output.error is None for output in outputs.values())
    return [(output.generated_tokens, torch.tensor(output.logprobs)) for output in outputs.values()]


def one_by_one(model):
    each = [generate(model, torch.tensor([ids]), max_new_tokens=NEW)[0] for ids in PROMPTS]
    return [(row.argmax(-1).tolist(), row.log_softmax(-1).amax(-1)) for row in each]


def assert_equal(got, want):
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    for (_, ours), (_, theirs) in zip(got, want):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("family", "method", "parameters"), CASES)
def test_a_batch_gives_what_generate_gives(family, method, parameters):
    """Requests start while others decode."""
    model, lengths = build(family).double(), []

    def note(module, args, kwargs):
        lengths.append(kwargs["cu_seq_lens_q"].diff().tolist())

    plain = one_by_one(model)
    with extend(model, method, **parameters):
        want = one_by_one(model)
        model.register_forward_pre_hook(note, with_kwargs=True)
        assert_equal(batch(model), want)
    assert any(1 in each and max(each) > 1 for each in lengths)
    assert all(sum(each) <= BATCH_TOKENS for each in lengths)
    assert max((a[1] - b[1]).abs().max().item() for a, b in zip(want, plain)) > 0.01


@pytest.mark.parametrize(
    "compile_level",
    [0, pytest.param(1, marks=pytest.mark.thorough)],  # which takes a minute
)
def test_requests_share_the_pages_of_a_beginning(monkeypatch, compile_level):
    model, matched = build("llama").double(), []
    search = PagedAttentionCache.search_prefix_match

    def note(*args):
        matched.append(search(*args))
        return matched[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", note)
    with extend(model, "leaky_rerope", **LEAKY):
        assert_equal(batch(model, default_compile_level=compile_level), one_by_one(model))
    assert max(matched) >= 2 * PAGE


def test_steps_through_a_block_table(monkeypatch):
    """Where flash-attn is installed, transformers gives steps a table and writes nothing."""
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    model, tables = build("llama").double(), []

    def note(module, args, kwargs):
        tables.append(kwargs["block_table"])

    with extend(model, "leaky_rerope", **LEAKY):
        want = one_by_one(model)
        model.register_forward_pre_hook(note, with_kwargs=True)
        assert_equal(batch(model, max_blocks_per_request=16), want)
    assert any(table is not None for table in tables)


def test_pages_kept_between_batches_are_those_of_one_extension():
    """A manager that stays with the model, in a wrapper or not, keeps pages of prompts."""
    model = build("llama").double()
    plain = batch(model, persistent_manager=True)
    with extend(nn.Sequential(model), "leaky_rerope", **LEAKY):
        got = batch(model, persistent_manager=True)
    assert_equal(batch(model), plain)
    with extend(model, "leaky_rerope", **LEAKY):
        assert_equal(got, one_by_one(model))


def test_a_batch_of_a_model_that_attends_by_name():
    model = build("llama").double()
    with extend(model, "yarn", factor=4.0):
        want = one_by_one(model)
        model.set_attn_implementation("extrope")
        assert_equal(batch(model), want)
        assert model.config._attn_implementation == "extrope"
        with pytest.raises(TypeError):
            model.init_continuous_batching(unknown=True)
        assert model.config._attn_implementation == "extrope"


def test_a_length_of_each_request_is_refused():
    model = build("llama")
    with (
        extend(model, "dynamic_ntk", factor=4.0),
        extend(model, "rerope", window=16),
        pytest.raises(ValueError, match="dynamic_ntk must be given a seq_len for continuous"),
    ):
        batch(model)
    assert "init_continuous_batching" not in vars(model)


def test_layers_that_leave_the_cache_to_their_attention_are_refused():
    """Those of transformers before 5.24: they get their cache's numbers by kind of layers."""
    options = {"read_index": [], "cu_seq_lens_k": {"full_attention": torch.tensor([0, 3])}}
    x = torch.zeros(1, 3, 2, 16)
    with pytest.raises(ValueError, match=r"extend: transformers must be >= 5\.24"):
        paged.attend(x, x, x, options, {})
