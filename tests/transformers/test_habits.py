"""What a person tries first: names, arguments and what is printed."""

import warnings

import pytest
import torch
from support.hf_models import build, tokens

import extrope_kernels
from extrope_kernels.integrations.transformers import extend


def test_extend_is_at_the_top():
    assert extrope_kernels.extend is extend
    with pytest.raises(AttributeError, match="has no attribute 'extendd'"):
        extrope_kernels.extendd  # noqa: B018


def test_a_handle_says_what_is_in_place():
    model = build("llama")
    with extend(model, "yarn", factor=4.0) as below:
        assert repr(below) == "yarn factor=4.0, reaches 128 tokens"
        with extend(model, "rerope", window=16) as handle:
            assert repr(handle) == (
                "rerope window=16 over yarn factor=4.0, 2 layers, reaches any length"
            )


def test_a_printed_model_shows_its_extension():
    model = build("llama")
    plain = repr(model)
    with extend(model, "yarn", factor=4.0):
        assert "LlamaRotaryEmbedding(extended by yarn: RopeFreqs(8 pairs, " in repr(model)
        with extend(model, "rerope", window=16):
            assert "extended by rerope: RopeFreqs(8 pairs, " in repr(model)
    assert repr(model) == plain


def test_generation_past_the_extended_length_warns_at_the_callers_line():
    model, ids = build("llama"), tokens(1, 40)

    def told(new=30):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.generate(ids, max_new_tokens=new, do_sample=False)
        return [(str(each.message), each.filename) for each in caught if "extend: " in str(each)]

    with extend(model, "yarn", factor=2.0):
        message = "extend: this generation may go past the 64 tokens that yarn reaches"
        assert told(24) == [] and told() == [(message, __file__)] and told() == []  # once
        with extend(model, "rerope", window=16):
            assert told() == []
    with extend(model, "yarn", factor=4.0):
        assert told() == []
    assert "generate" not in vars(model)


def test_a_forward_past_the_extended_length_warns_once():
    model = build("llama")

    def told(*ids, **given):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for each in ids:
                given["past_key_values"] = model(each, use_cache=True, **given).past_key_values
        return [str(each.message) for each in caught if "extend: " in str(each)]

    long, short = tokens(1, 65), tokens(1, 64)
    message = "extend: this forward goes past the 64 tokens that yarn reaches"
    with extend(model, "yarn", factor=2.0):
        assert told(short) == [] and told(long) == [message] and told(long) == []
    with extend(model, "yarn", factor=2.0):
        assert told(short, tokens(1, 1)) == [message]  # with those in the cache
    packed = torch.arange(40).repeat(1, 2)
    with extend(model, "yarn", factor=2.0):
        assert told(tokens(1, 80), position_ids=packed) == []
        assert told(tokens(1, 80), position_ids=packed + 30) == [message]
    with extend(model, "yarn", factor=2.0), extend(model, "rerope", window=16):
        assert told(long) == []  # which reaches any length
    assert told(long) == []


def test_names_of_transformers_are_taken_and_told():
    for name, told in (
        ("linear", "pi factor=4.0, reaches 128 tokens: 'linear' of transformers"),
        ("dynamic", "dynamic_ntk factor=4.0, reaches any length, chosen per request: 'dynamic'"),
    ):
        with extend(build("llama"), name, factor=4.0) as handle:
            assert repr(handle).startswith(told)
