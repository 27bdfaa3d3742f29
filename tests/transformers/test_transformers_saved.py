"""What a handle saves: read by plain transformers, and by `extend_from_saved`."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from support import tiny_models
from support.hf_models import (
    SCORE_PARAMETERS,
    TRAINED,
    assert_as_exact_as,
    build,
    freqs_of,
    logits,
    tokens,
    transformers,
)
from test_transformers_training import with_lora

from extrope_kernels.integrations.transformers import extend, extend_from_saved

IDS = tokens(2, 90)
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
# Each with the length that it reaches, and max_position_embeddings of the config.
NAMED = [
    ("pi", {"factor": 4.0}, 128, 128),
    ("yarn", {"factor": 4.0, "beta_fast": 16.0}, 128, 128),
    ("yarn", {"factor": 4.0, "attention_factor": 1.25, "truncate": False}, 128, 128),
    ("llama3", {"factor": 4.0}, 128, 128),
    ("longrope", {"short_factor": [1.0] * 8, "long_factor": FACTORS, "factor": 4.0}, 128, 128),
    ("ntk_aware", {"factor": 4.0}, 128, 128),
    ("dynamic_ntk", {"factor": 4.0}, None, TRAINED),
    ("abf", {"base": 1e6}, None, TRAINED),
    ("rope", {}, TRAINED, TRAINED),
]


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def in_float64(model, method, **parameters):
    """The logits of a float64 copy with this extension."""
    model = copy.deepcopy(model).double()
    with extend(model, method, **parameters):
        return logits(model, IDS)


def saved(model, folder, *extensions):
    """The logits of a model with these extensions, all of which are undone after it is saved."""
    handles = [extend(model, method, **parameters) for method, parameters in extensions]
    want = logits(model, IDS)
    handles[-1].save_pretrained(folder)
    for handle in reversed(handles):
        handle.restore()
    return want


@pytest.mark.parametrize(("method", "parameters", "length", "longest"), NAMED)
def test_transformers_reads_what_a_config_can_name(method, parameters, length, longest, tmp_path):
    model = build("llama").double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        want = saved(model, tmp_path, (method, parameters))
    plain = loaded(tmp_path)
    assert plain.config.max_position_embeddings == longest
    assert model.config.max_position_embeddings == TRAINED
    assert_same_frequencies(model, plain, method, parameters)
    narrow = build("llama")
    with extend(narrow, method, **parameters):  # transformers' tables alone are float32, here all
        assert_as_exact_as(logits(plain, IDS), logits(narrow, IDS), want)
    for again in (plain, build("llama").double()):
        with extend_from_saved(again, tmp_path) as handle:
            assert handle.length == length
            assert torch.equal(logits(again, IDS), want)


def assert_same_frequencies(model, plain, method, parameters):
    """transformers' tables are float32, so its logits alone would not tell."""
    with extend(model, method, **parameters):
        logits(model, IDS)
        ours = next(m.forward for m in model.modules() if hasattr(m, "rope_type")).freqs[None]
    logits(plain, IDS)
    theirs = freqs_of(plain)
    # 1e-30: of pairs that do not rotate.
    torch.testing.assert_close(theirs.inv_freq.float(), ours.inv_freq, rtol=1e-6, atol=1e-30)
    assert theirs.attention_factor == pytest.approx(ours.attention_factor, rel=1e-6)


def test_the_trained_length_that_another_scaling_named(tmp_path):
    """The next extension takes it from the config."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
    for factor in (4.0, 8.0):
        model = build("llama", scaled, max_position_embeddings=4 * TRAINED)
        saved(model, tmp_path, ("pi", {"factor": factor}))
        plain = loaded(tmp_path)
        assert plain.config.max_position_embeddings == factor * TRAINED
        with extend(model, "yarn", factor=4.0) as own, extend(plain, "yarn", factor=4.0) as again:
            assert again.length == own.length == 4 * TRAINED
            torch.testing.assert_close(logits(plain, IDS), logits(model, IDS))


@pytest.mark.parametrize(
    ("method", "parameters", "told"),
    [
        ("yarn", {"factor": 4.0}, f"yarn original_max_position_embeddings={TRAINED} factor=4.0, "),
        (
            "yarn",
            {"factor": 4.0, "beta_fast": 16.0},
            f"yarn original_max_position_embeddings={TRAINED} factor=4.0 beta_f",
        ),
        ("pi", {"factor": 4.0}, "pi factor=4.0, "),
        ("self_extend", {"window": 8, "factor": 2}, "self_extend window=8 factor=2, "),
    ],
)
def test_what_was_saved_is_told_without_defaults(method, parameters, told, tmp_path):
    model = build("llama")
    saved(model, tmp_path, (method, parameters))
    assert json.loads((tmp_path / "extrope.json").read_text())["extensions"][0]["parameters"]
    with extend_from_saved(model, tmp_path) as handle:
        assert str(handle).startswith(told)


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [({}, "full"), ({}, "all"), ({"layer_types": ["sliding_attention"] * 2}, "all")],
)
def test_a_model_with_a_rotation_for_each_kind_of_layers(sizes, layers, tmp_path):
    model = build("gemma3_text", **sizes)
    with extend(model, "pi", layers=layers, factor=4.0) as handle:
        want = logits(model, IDS)
        handle.save_pretrained(tmp_path)
    plain, exact = loaded(tmp_path), in_float64(model, "pi", layers=layers, factor=4.0)
    assert_as_exact_as(logits(plain, IDS), want, exact)
    with extend_from_saved(plain, tmp_path):
        assert torch.equal(logits(plain, IDS), want)


@pytest.mark.parametrize(
    "name",
    [
        "Phi3ForCausalLM",  # knows longrope alone
        "Ernie4_5_VLMoeForConditionalGeneration",  # its own frequencies alone
    ],
)
def test_a_class_that_does_not_know_the_type(name, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = tiny_models.build(name)
    with pytest.warns(UserWarning, match="no rope_parameters for yarn with these"):
        want = saved(model, tmp_path, ("yarn", {"factor": 4.0}))
    plain = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, IDS), logits(model, IDS))
    with extend_from_saved(plain, tmp_path):
        assert torch.equal(logits(plain, IDS), want)


UNNAMED = [
    ([("rerope", {"window": 7})], "rerope", None, TRAINED),
    ([("xpos", {})], "xpos", None, TRAINED),
    ([("dynamic_yarn", {})], "dynamic_yarn", None, TRAINED),
    ([("yarn", {"factor": 4.0, "ramp": "rotations"})], "yarn", 128, TRAINED),
    ([("pi", {"factor": 2.0, "resonance": True})], "pi", 64, TRAINED),
    ([("giraffe_power", {"power": 0.1})], "giraffe_power", None, TRAINED),
    (
        [("yarn", {"factor": 4.0}), ("dual_chunk", SCORE_PARAMETERS["dual_chunk"])],
        "dual_chunk",
        None,
        128,
    ),
    (
        [("yarn", {"factor": 4.0}), ("self_extend", {"window": 8, "factor": 4})],
        "self_extend",
        488,
        128,
    ),
]


@pytest.mark.parametrize(("extensions", "unnamed", "length", "longest"), UNNAMED)
def test_what_no_config_can_name_is_stored_beside(extensions, unnamed, length, longest, tmp_path):
    model = build("llama").double()
    with pytest.warns(
        UserWarning, match=f"extend: transformers has no rope_parameters for {unnamed} with these"
    ):
        want = saved(model, tmp_path, *extensions)
    plain = loaded(tmp_path)
    assert plain.config.max_position_embeddings == longest
    assert not torch.allclose(logits(plain, IDS), want, atol=1e-2)
    before = logits(plain, IDS)
    handle = extend_from_saved(plain, tmp_path)
    assert handle.length == length
    assert torch.equal(logits(plain, IDS), want)
    handle.restore()
    assert torch.equal(logits(plain, IDS), before)


def test_a_model_saved_by_itself_or_by_a_trainer_keeps_its_extension(tmp_path):
    model = build("llama")
    with extend(model, "rerope", window=7):
        want = logits(model, IDS)
        message = "is the plain model's; its extension by rerope is in"
        with pytest.warns(UserWarning, match=message) as warned:
            model.save_pretrained(tmp_path / "whole")
        assert warned[0].filename == __file__
        adapted = with_lora(model)
    adapted = with_lora(build("llama"))
    with extend(adapted, "rerope", window=7), warnings.catch_warnings():
        warnings.simplefilter("error")  # there is no config.json beside adapters
        adapted.save_pretrained(tmp_path / "adapters")
        adapted.save_pretrained(tmp_path / "adapters")
    for name in ("whole", "adapters"):
        card = (tmp_path / name / "README.md").read_text()
        assert card.count("## Extended: rerope window=7\n") == 1
        plain = build("llama")
        with extend_from_saved(plain, tmp_path / name):
            assert torch.equal(logits(plain, IDS), want)


def test_adapters_of_an_extended_model_keep_its_extension(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model, rerope = build("llama"), ("rerope", {"window": 7})
    with extend(model, "yarn", factor=4.0), extend(model, rerope[0], **rerope[1]):
        adapted = with_lora(model)
        adapted.save_pretrained(tmp_path / "added later")
        monkeypatch.setattr(
            peft.PeftModel, "save_pretrained", peft.PeftModel.save_pretrained.original
        )  # as if PEFT were imported only now
        adapted.train()(IDS)
        adapted.save_pretrained(tmp_path / "imported later")
    adapted.save_pretrained(tmp_path / "restored")
    adapted = with_lora(build("llama"))
    with extend(adapted.base_model.model, "yarn", factor=4.0):
        adapted.save_pretrained(tmp_path / "base", is_main_process=True)

    def saved(name):
        found = json.loads((tmp_path / name / "extrope.json").read_text())["extensions"]
        return [each["method"] for each in found]

    assert saved("added later") == saved("imported later") == ["yarn", "rerope"]
    assert saved("base") == ["yarn"]
    assert not (tmp_path / "restored" / "extrope.json").exists()


def test_a_model_whose_adapters_were_merged(tmp_path):
    adapted = with_lora(build("llama"))
    with extend(adapted, "yarn", factor=4.0) as handle:
        adapted.merge_and_unload()
        want = logits(adapted.base_model.model, IDS)
        handle.save_pretrained(tmp_path)
    exact = in_float64(adapted.base_model.model, "yarn", factor=4.0)
    assert_as_exact_as(logits(loaded(tmp_path), IDS), want, exact)


def test_a_length_of_the_users(tmp_path):
    model = build("llama")
    with extend(model, "abf", base=1e6) as handle:
        handle.save_pretrained(tmp_path, length=4 * TRAINED)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["max_position_embeddings"] == 4 * TRAINED
    # Who stretches it again begins at what was trained.
    with extend(loaded(tmp_path), "pi", factor=2.0) as handle:
        assert handle.length == 2 * TRAINED
    with extend(model, "self_extend", window=8, factor=4) as handle, pytest.warns(UserWarning):
        handle.save_pretrained(tmp_path, length=handle.length)
    with extend_from_saved(loaded(tmp_path), tmp_path) as again:
        assert again.length == handle.length == 8 + 4 * (TRAINED - 8)


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        ({"window": 8, "factor": math.inf}, None),  # ReRoPE
        ({"window": 2 * TRAINED, "factor": 4.0}, TRAINED),  # nothing lies past the window
    ],
)
def test_lengths_of_leaky_rerope(parameters, length):
    with extend(build("llama"), "leaky_rerope", **parameters) as handle:
        assert handle.length == length


def test_numbers_of_numpy(tmp_path):
    model = build("llama").double()
    factors = [np.float32(factor) for factor in FACTORS]
    own = {"short_factor": factors, "long_factor": factors, "factor": np.float32(4)}
    with pytest.warns(UserWarning, match="for self_extend with these"):
        want = saved(
            model,
            tmp_path,
            ("longrope", own),
            ("self_extend", {"window": np.int64(8), "factor": np.int64(4)}),
        )
    plain = loaded(tmp_path)
    assert plain.config.rope_parameters["factor"] == 4
    with extend_from_saved(plain, tmp_path):
        assert torch.equal(logits(plain, IDS), want)


def test_kinds_of_layers_whose_heads_differ(tmp_path):
    """Gemma 4: heads of 32 dims where a layer sees all keys, of 16 in a window."""
    model = tiny_models.build("Gemma4ForCausalLM")
    own = logits(model, IDS)
    with extend(model, "pi", factor=2.0, layers="all"), pytest.warns(UserWarning):
        want = logits(model, IDS)
        model.save_pretrained(tmp_path)
    assert not torch.equal(want, own)
    with extend_from_saved(model, tmp_path):
        assert torch.equal(logits(model, IDS), want)


def test_what_only_one_process_writes(tmp_path):
    model = build("llama")
    with extend(model, "yarn", factor=4.0) as handle:
        model.save_pretrained(tmp_path, is_main_process=False)
        handle.save_pretrained(tmp_path, is_main_process=False)
        assert not list(tmp_path.iterdir())
        for each in (model, handle):
            with pytest.raises(ValueError, match="extend: push_to_hub must be left out"):
                each.save_pretrained(tmp_path, push_to_hub=True)
        assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_or_read(tmp_path):
    model = build("llama")
    handle = extend(model, "yarn", factor=4.0)
    handle.restore()
    with pytest.raises(ValueError, match="save_pretrained must come before restore"):
        handle.save_pretrained(tmp_path)
    with (
        extend(with_lora(model), "yarn", factor=4.0) as handle,
        pytest.raises(TypeError, match="needs a model of transformers, got PeftModel"),
    ):
        handle.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"extend_from_saved: folder must have a file extrope\.json"
    ):
        extend_from_saved(model, tmp_path)
    (tmp_path / "extrope.json").write_text('{"extensions": [{"method": "yarn"}]}')
    with pytest.raises(ValueError, match="must hold what an extension has saved, got TypeError"):
        extend_from_saved(model, tmp_path)
