"""What a person tries first: names, arguments and what is printed."""

import warnings

import pytest
from hf_models import build, tokens

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
        assert told() == [(message, __file__)] and told(24) == []
        with extend(model, "rerope", window=16):
            assert told() == []
    with extend(model, "yarn", factor=4.0):
        assert told() == []
    assert "generate" not in vars(model)
