"""Models that were trained under a scaling keep it when a method extends them."""

import copy

import pytest
import torch
from support import tiny_models
from support.hf_models import (
    TRAINED,
    build,
    freqs_of,
    logits,
    rotary_dim,
    rotary_of,
    tokens,
    transformers,
)

from extrope_kernels import methods
from extrope_kernels.integrations.transformers import extend, extend_from_saved

ORIGINAL = "original_max_position_embeddings"
IDS = tokens(2, 50)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    ORIGINAL: 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [1.0 + 0.7 * n for n in range(8)],
    "factor": 4.0,
    ORIGINAL: 8,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
SCALINGS = [
    ("gemma3_text", LINEAR),
    ("llama", LLAMA3),
    ("llama", LONGROPE),
    ("qwen3", PROPORTIONAL),
]
# Methods with the length that each takes for the trained one.
METHODS = [
    ("yarn", {"factor": 2.0}, ORIGINAL),
    ("pi", {"factor": 2.0}, None),
    ("ntk_aware", {"factor": 2.0}, None),
    ("dynamic_ntk", {"factor": 2.0, "seq_len": 64}, "max_position_embeddings"),
]


def trained_freqs(model):
    """The frequencies of a plain model after a forward as long as its training."""
    logits(model, tokens(1, TRAINED))
    return freqs_of(model)


def with_buffers(model, freqs):
    """The plain model, its rotary embedding told other frequencies."""
    model = copy.deepcopy(model)
    rotary = rotary_of(model)
    prefix = "full_attention_" if isinstance(rotary.rope_type, dict) else ""
    for name in ("inv_freq", "original_inv_freq"):
        getattr(rotary, prefix + name).copy_(freqs.inv_freq)
    setattr(rotary, f"{prefix}attention_scaling", freqs.attention_factor)
    types = rotary.rope_type
    rotary.rope_type = dict.fromkeys(types, "default") if prefix else "default"
    return model


@pytest.mark.parametrize(("method", "parameters", "length"), METHODS)
@pytest.mark.parametrize(("family", "scaling"), SCALINGS)
def test_a_method_scales_what_was_trained(family, scaling, method, parameters, length):
    model = build(family, scaling)
    over = trained_freqs(model)
    dim = 2 * len(over.inv_freq) if family == "qwen3" else rotary_dim(family)
    lengths = {} if length is None else {length: TRAINED}
    freqs = methods.METHODS[method](dim, **parameters, **lengths, over=over)
    assert freqs.attention_factor >= over.attention_factor
    want = logits(with_buffers(model, freqs), IDS)
    with extend(model, method, **parameters):
        got = logits(model, IDS)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    plain = methods.METHODS[method](dim, **parameters, **lengths)
    assert (logits(with_buffers(model, plain), IDS) - want).abs().max() > 0.1  # not what it was


@pytest.mark.parametrize(("family", "scaling"), SCALINGS)
def test_rope_is_the_model_as_it_was_trained_and_saved_so(family, scaling, tmp_path):
    model = build(family, scaling)
    want = logits(with_buffers(model, trained_freqs(model)), IDS)
    with extend(model, "rope") as handle:
        torch.testing.assert_close(logits(model, IDS), want, rtol=2e-4, atol=2e-4)
        if scaling not in (LLAMA3, LONGROPE):
            return
        want = logits(model, IDS)
        handle.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, IDS), want, rtol=1e-4, atol=1e-4)
    for again in (plain, model):
        with extend_from_saved(again, tmp_path):
            torch.testing.assert_close(logits(again, IDS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [{"base": 10000.0}, {ORIGINAL: 8}])
def test_a_base_or_a_length_of_the_callers_means_plain_rope(given):
    model = build("llama", LLAMA3)
    freqs = methods.yarn(
        16, factor=4.0, **{ORIGINAL: 8}, **{k: v for k, v in given.items() if k == "base"}
    )
    want = logits(with_buffers(model, freqs), IDS)
    with extend(model, "yarn", factor=4.0, **given):
        torch.testing.assert_close(logits(model, IDS), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("family", "scaling"), SCALINGS[1:3])
def test_a_saved_folder_has_the_trained_scaling_once(family, scaling, tmp_path):
    model = build(family, scaling)
    handle = extend(model, "yarn", factor=2.0)
    assert handle.length == 2 * TRAINED  # of the whole training
    want = logits(model, IDS)
    with pytest.warns(UserWarning, match="no rope_parameters for yarn"):
        handle.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for again in (plain, build(family, scaling)):
        with extend_from_saved(again, tmp_path):
            torch.testing.assert_close(logits(again, IDS), want, rtol=1e-6, atol=1e-6)


def test_dynamic_ntk_counts_from_the_length_before_a_yarn_of_the_file(tmp_path):
    model = build("llama")
    with extend(model, "yarn", factor=4.0) as handle:
        handle.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for method in ("dynamic_ntk", "dynamic_yarn"):
        given = {"factor": 2.0} if method == "dynamic_ntk" else {}
        with extend(model, method, **given):
            want = logits(model, IDS)
        with extend(reloaded, method, **given):
            torch.testing.assert_close(logits(reloaded, IDS), want)


def test_a_factor_below_1_gets_a_warning():
    model = build("llama")
    message = "extend: factor 0.5 of yarn is below 1: it shortens what a model reads"
    with pytest.warns(UserWarning, match=message), extend(model, "yarn", factor=0.5):
        pass


# YaRN as released models state it, for a shorter training.
OWN = {"rope_type": "yarn", ORIGINAL: 64}
MISTRAL = {"mscale": 1.0, "mscale_all_dim": 1.0}
YARNS = {
    "GptOssForCausalLM": OWN | {"rope_theta": 150000.0, "factor": 32.0, "truncate": False},
    "Ministral3ForCausalLM": OWN
    | {"rope_theta": 1e6, "factor": 16.0, "llama_4_scaling_beta": 0.1, **MISTRAL},
    "DeepseekV3ForCausalLM": OWN  # Kimi K2
    | {"rope_theta": 50000.0, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, **MISTRAL},
}


def with_yarn(name, factor=None):
    rope = YARNS[name] | ({} if factor is None else {"factor": factor})
    return tiny_models.build(name, rope_parameters=rope, max_position_embeddings=2048)


def assert_near(got, want):
    """Compare logits to 1e-5 of the largest: a lost parameter moves them by more than 0.5."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", YARNS)
def test_a_new_factor_of_yarn_leaves_its_other_parameters(name, tmp_path):
    model, ids = with_yarn(name), tokens(1, 100)
    plain = logits(model, ids)
    with extend(model, "yarn", factor=YARNS[name]["factor"]):
        assert_near(logits(model, ids), plain)
    want = logits(with_yarn(name, 8.0), ids)
    with extend(model, "yarn", factor=8.0) as handle:
        assert_near(logits(model, ids), want)
        handle.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_near(logits(again, ids), want)
    assert (want - plain).abs().max() > 0.1


def test_the_caller_names_another_parameter_of_yarn():
    ids, given = tokens(1, 100), {"truncate": True, "attention_factor": 1.5}
    model = with_yarn("GptOssForCausalLM")
    rope = YARNS["GptOssForCausalLM"] | given
    want = logits(tiny_models.build("GptOssForCausalLM", rope_parameters=rope), ids)
    with extend(model, "yarn", factor=32.0, **given):
        assert_near(logits(model, ids), want)
