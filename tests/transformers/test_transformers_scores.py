"""Score methods on models: logits against dense attention by definition, and what is refused."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager

import pytest
import torch
from support import attention_oracle as oracle
from support import score_examples
from support.hf_models import (
    ATTENDING,
    CACHE,
    SCORE_PARAMETERS,
    assert_as_exact_as,
    build,
    error,
    exact,
    freqs_of,
    logits,
    pairs,
    rotary_of,
    tokens,
)
from transformers import DynamicCache

from extrope_kernels import RopeFreqs, methods
from extrope_kernels.integrations.transformers import extend
from extrope_kernels.integrations.transformers.attention import ON_LAYER

SEQLEN = 44  # more than four chunks, and no multiple of anything below
IDS = tokens(2, SEQLEN, seed=2)


@contextmanager
def dense(model, method, formula, log_n=None, freqs=None):
    """Let the model attend by `formula` of the oracle; layers with a sliding window as ever."""
    example = score_examples.EXAMPLES[method]
    modeling = sys.modules[type(model).__module__]
    interleaved = "Cohere" in type(model).__name__
    freqs, rotary = freqs or freqs_of(model), rotary_of(model)
    local = RopeFreqs(getattr(rotary, "sliding_attention_inv_freq", freqs.inv_freq))

    def attend(module, q, k, v, mask, scaling, sliding_window=None, **_):
        relative = example.relative(q.shape[2], q.shape[2], **example.parameters)
        options = {"scale": scaling, "interleaved": interleaved, "log_n": log_n}
        layer_freqs = freqs
        if sliding_window is not None:
            relative = score_examples.PLAIN.relative(q.shape[2], q.shape[2]).within(sliding_window)
            layer_freqs = local
            del options["log_n"]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return formula(q, k, v, relative, layer_freqs, **options)[0].to(v.dtype), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
        patch.setattr(modeling, "eager_attention_forward", attend)
        model.set_attn_implementation("eager")
        yield model


def dense_logits(model, method, formula, **options):
    with dense(copy.deepcopy(model), method, formula, **options) as patched:
        return logits(patched, IDS)


@pytest.mark.parametrize(("family", "method"), pairs(ATTENDING, SCORE_PARAMETERS))
def test_logits_are_those_of_dense_attention(family, method):
    model = build(family, **ATTENDING[family])
    log_n = {"log_n": 16} if family in ("qwen2", "cohere") else {}
    plain, plain_exact = logits(model, IDS), logits(exact(model, freqs_of(model)), IDS)
    want = dense_logits(model.double(), method, oracle.closed_form, **log_n)
    model.float()
    expected = dense_logits(model, method, oracle.plain_formula, **log_n)
    with extend(model, method, **SCORE_PARAMETERS[method], **log_n):
        got = logits(model, IDS)
    assert_as_exact_as(got, expected, want)
    assert error(got, plain) > 1000 * error(got, want)
    # A window that nothing exceeds gives the plain model.
    sizes = {"window": 48, "shift": 48, "block_size": 2 * SEQLEN, "factor": 4}
    sizes |= {"chunk_size": 2 * SEQLEN, "local_window": SEQLEN}
    with extend(model, method, **{name: sizes[name] for name in SCORE_PARAMETERS[method]}):
        assert_as_exact_as(logits(model, IDS), plain, plain_exact)


@pytest.mark.parametrize("method", SCORE_PARAMETERS)
def test_a_model_keeps_the_frequencies_of_its_config(method):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = build("llama", yarn)
    assert freqs_of(model).attention_factor != 1.0
    want = dense_logits(model.double(), method, oracle.closed_form)
    expected = dense_logits(model.float(), method, oracle.plain_formula)
    with extend(model, method, **SCORE_PARAMETERS[method]):
        got = logits(model, IDS)
    assert_as_exact_as(got, expected, want)
    # The same frequencies from an extension before it.
    plain = build("llama")
    with extend(plain, "yarn", factor=4.0), extend(plain, method, **SCORE_PARAMETERS[method]):
        assert_as_exact_as(logits(plain, IDS), expected, want)
        assert error(logits(plain, IDS), got) < 1e-5


@pytest.mark.parametrize("method", ["dual_chunk", "blockwise_causal"])
def test_positions_that_start_anew_take_the_decay_of_xpos(method):
    model, freqs = build("llama"), methods.xpos(16)
    with extend(model, "xpos"), extend(model, method, **SCORE_PARAMETERS[method]):
        got = logits(model, IDS)
    with extend(model, method, **SCORE_PARAMETERS[method]):
        without = logits(model, IDS)
    expected = dense_logits(model, method, oracle.plain_formula, freqs=freqs)
    want = dense_logits(model.double(), method, oracle.closed_form, freqs=freqs)
    assert_as_exact_as(got, expected, want)
    assert error(got, without) > 1000 * error(got, want)


def test_logits_of_chunks_grow_from_the_trained_length_on():
    """As in Qwen's models of 1M tokens: by (0.1 ln(tokens / trained length) + 1) squared."""
    model, trained = build("qwen2"), 12
    ratio = torch.arange(1, SEQLEN + 1, dtype=torch.float64) / trained
    growth = (0.1 * ratio.log().clamp(min=0) + 1).square()[:, None, None]

    def grown(formula):
        return lambda q, *others, **options: formula((q * growth).to(q.dtype), *others, **options)

    want = dense_logits(model.double(), "dual_chunk", grown(oracle.closed_form))
    expected = dense_logits(model.float(), "dual_chunk", grown(oracle.plain_formula))
    given = {**SCORE_PARAMETERS["dual_chunk"], "original_max_position_embeddings": trained}
    with extend(model, "dual_chunk", **given):
        got = logits(model, IDS)
    assert_as_exact_as(got, expected, want)


@pytest.mark.parametrize("method", SCORE_PARAMETERS)
def test_padding_on_either_side_changes_no_token(method):
    model, mask = build("llama").double(), torch.ones_like(IDS)
    mask[0, :11] = mask[1, -5:] = 0
    with extend(model, method, **SCORE_PARAMETERS[method]):
        got = logits(model, IDS, attention_mask=mask)
        torch.testing.assert_close(got[:1, 11:], logits(model, IDS[:1, 11:]))
        torch.testing.assert_close(got[1:, :-5], logits(model, IDS[1:, :-5]))
        pairs_seen = mask[:1, None].bool() & torch.ones(SEQLEN, SEQLEN).tril().bool()
        pairs_seen[:, :11] = True  # as a finished mask has it, where a row would be all -inf
        again = logits(model, IDS[:1], attention_mask=pairs_seen[:, None])
        torch.testing.assert_close(again[:, 11:], got[:1, 11:])
        mask[0] = 0
        assert logits(model, IDS, attention_mask=mask).isfinite().all()


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("dtype", "method"), pairs([torch.bfloat16, torch.float16], SCORE_PARAMETERS)
)
def test_half_precision_is_no_worse_than_dense_attention(method, dtype):
    model = build("llama")
    freqs = rotary_of(model).inv_freq.clone()
    model.to(dtype)
    twin = copy.deepcopy(model)
    for each in (model, twin):  # the cast rounds them, and each side would undo that in its way
        rotary_of(each).inv_freq = freqs
    want = dense_logits(twin.double(), method, oracle.closed_form)
    expected = dense_logits(model, method, oracle.plain_formula)
    with extend(model, method, **SCORE_PARAMETERS[method]):
        got = logits(model, IDS)
    assert rms(got - want) <= 1.1 * rms(expected - want)


def test_frequencies_that_a_cast_has_rounded_come_from_the_config():
    model, cast = build("llama"), build("llama").bfloat16()
    with extend(model, "rerope", window=7), extend(cast, "rerope", window=7):
        in_force = [rotary_of(m).forward.freqs[None].inv_freq for m in (model, cast)]
    assert torch.equal(*in_force)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_slow_frequencies_are_told_apart_in_half_precision(family):
    model = build(family).bfloat16()
    with extend(model, "pi", factor=512.0), extend(model, "rerope", window=8):
        layer = vars(model.model.layers[0].self_attn)[ON_LAYER]
        assert (layer.interleaved, layer.start, layer.sign) == (family == "cohere", 0, 1)


def test_rotations_follow_the_device_of_a_layer():
    """The one that every layer gets."""
    model, seen = build("llama"), []
    with extend(model, "leaky_rerope", window=7, factor=3.5):
        layer = model.model.layers[1].self_attn
        with layer.register_forward_pre_hook(lambda *args: seen.append(args[2]), with_kwargs=True):
            logits(model, IDS)
    rotation, _ = seen[0]["position_embeddings"]
    moved = rotation.to("meta", non_blocking=True)
    assert {x.device.type for x in (moved.positions, moved.freqs.inv_freq)} == {"meta"}
    assert rotation.positions.device.type == "cpu"


def test_autocast_leaves_queries_wider_than_values():
    model = build("qwen3")
    with extend(model, "rerope", window=7), torch.autocast("cpu", torch.bfloat16):
        got = logits(model, IDS)
    with extend(model, "rerope", window=7):
        assert error(got, logits(model, IDS)) < 0.5


def _inputs_that_make_no_rows():
    hole, both_ways = torch.ones_like(IDS), torch.ones(2, 1, 44, 44).bool()
    hole[0, 9] = 0
    pieces = "attention_mask must be causal with each row's tokens or packed sequence in one piece"
    return [
        ({"attention_mask": hole}, pieces),
        ({"attention_mask": hole[:, 1:]}, r"attention_mask must be \(2, 44\), cached tokens inc"),
        ({"attention_mask": both_ways}, pieces),
        ({"position_ids": torch.arange(44)[None] + 1}, "position_ids must count 0, 1, 2, ... from"),
        ({"output_attentions": True}, "output_attentions must be False"),
    ]


def test_refuses_rows_that_have_no_beginning():
    model = build("llama")
    with extend(model, "rerope", window=7):
        for inputs, message in _inputs_that_make_no_rows():
            with pytest.raises(ValueError, match="^extend: .*" + message):
                logits(model, IDS, **inputs)


def test_refuses_a_cache_that_drops_keys():
    class Forgetful(DynamicCache):
        def update(self, *args, **options):
            k, v = super().update(*args, **options)
            return k[:, :, -30:], v[:, :, -30:]

    model = build("llama")
    with (
        extend(model, "rerope", window=7),
        pytest.raises(ValueError, match="or a cache that does not return all keys, in LlamaAtt"),
    ):
        model(IDS, **{CACHE: Forgetful(config=model.config)})


def test_refuses_dropout():
    model = build("llama", attention_dropout=0.1)
    with extend(model, "rerope", window=8):
        logits(model, IDS)
        with pytest.raises(ValueError, match="extend: a model in training must have attention_dr"):
            model.train()(IDS)


def test_a_layer_runs_outside_of_its_model():
    model, x = build("llama"), torch.randn(1, 20, 64, generator=torch.manual_seed(1))
    tables = model.model.rotary_emb(x, torch.arange(20)[None])
    layer = model.model.layers[0].self_attn
    before, _ = layer(x, tables, None)
    with extend(model, "rerope", window=20):
        torch.testing.assert_close(layer(x, tables, None)[0], before, atol=1e-5, rtol=1e-5)
    with extend(model, "rerope", window=8):
        assert error(layer(x, tables, None)[0][:, 8:], before[:, 8:]) > 1e-3


def test_score_methods_go_on_last_and_once():
    model = build("llama")
    with extend(model, "xpos"), pytest.raises(ValueError, match="without decay, got xpos"):
        extend(model, "rerope", window=8)
    with extend(model, "rerope", window=8):
        want = logits(model, IDS)
        for method in ("abf", "dual_chunk"):
            with pytest.raises(ValueError, match=f"extend: {method} must come before rerope"):
                extend(model, method)
        assert torch.equal(logits(model, IDS), want)


def test_a_model_that_shares_its_config_is_untouched():
    model = build("llama")
    other = type(model)(model.config).eval()
    before = logits(other, IDS)
    with extend(model, "rerope", window=8):
        logits(model, IDS)
        assert torch.equal(logits(other, IDS), before)
