"""`check(model)`: what rotates in a loaded model, after what loaders and trainers do to it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.tiny_models import build

import extrope_kernels
from extrope_kernels import check, extend, methods
from extrope_kernels.integrations import transformers as ours

transformers = pytest.importorskip("transformers")

LENGTH, PAIRS = 4096, 32
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * PAIRS,
    "long_factor": [3.0] * PAIRS,
    "original_max_position_embeddings": 1024,
    "factor": 4.0,
}
AMPLITUDE = 0.1 * math.log(4) + 1
NOT_YARN = "; NOT as stated (yarn factor 4, base 10000)"


def llama(rope=YARN, **settings):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), 64)
    config = transformers.LlamaConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=1,
        rope_parameters=copy.deepcopy(rope),
        **{"max_position_embeddings": LENGTH, **settings},
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def lines(model):
    """The report's lines behind the first, which says if all is well."""
    report = check(model)
    first, *others = str(report).splitlines()
    assert first == f"{report.model}: {'ok' if report.ok else 'NOT ok'}"
    assert repr(report) == str(report)
    return others


def state(model):
    """Every attribute and buffer of the rotary embedding, buffers by identity and to the bit."""
    rotary = model.model.rotary_emb
    attributes = {name: id(value) for name, value in vars(rotary).items()}
    return attributes, [(name, id(x), x.clone()) for name, x in rotary._buffers.items()]


@pytest.mark.parametrize(
    "rope", [PLAIN, YARN, LONGROPE, {**PLAIN, "rope_type": "dynamic", "factor": 2.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_as_loaded_is_as_stated_and_unchanged(rope, dtype, tmp_path):
    """Loaded in bfloat16, transformers keeps the frequencies in float32."""
    llama(rope).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    attributes, buffers = state(model)
    (line,) = lines(model)
    assert line.startswith("all layers: as stated (")
    (rotation,) = check(model).rotations
    # A float32 angle of 4,096 is off by 2^-12 at most, a bfloat16 of 1 by 2^-9.
    assert rotation.ok and rotation.error <= AMPLITUDE * (2**-12 if dtype.itemsize == 4 else 2**-8)
    after = state(model)
    assert after[0] == attributes
    for (name, identity, before), (again, other, now) in zip(buffers, after[1], strict=True):
        assert (name, identity) == (again, other) and torch.equal(before, now)


@pytest.mark.parametrize(
    ("rope", "length", "stated"),
    [
        (YARN, LENGTH, "yarn factor 4, base 10000"),
        (PLAIN | {"rope_theta": 5e5}, 64, "plain RoPE, base 500000"),  # shows past its length
    ],
)
def test_a_cast_of_the_whole_model_rounds_the_frequencies(rope, length, stated):
    """As DeepSpeed's and `model.to` do. It shows where the fastest pair that rounds is off."""
    model = llama(rope, max_position_embeddings=length)
    for dtype in (torch.float32, torch.bfloat16):
        rotary = model.to(dtype).model.rotary_emb
        exact = methods.from_hf_config(model.config).inv_freq.double()
        rotary.inv_freq = rotary.inv_freq.bfloat16()
        off = (rotary.inv_freq.double() - exact).abs().max()
        (rotation,) = check(model).rotations
        assert (rotation.ok, rotation.rounded) == (False, "bfloat16")
        assert rotation.shows_from == math.ceil(0.01 / off)
        assert str(rotation) == (
            f"all layers: {stated}, with frequencies rounded to bfloat16; "
            f"off by more than 0.01 from position {rotation.shows_from} on"
        )


@pytest.mark.parametrize("length", [16, 32, 64, 4096])
def test_a_cast_shows_from_one_threshold_on_at_any_length(length):
    """In bfloat16 too, where 64 positions were right with an error of 0.013."""
    model = llama(PLAIN, max_position_embeddings=length).bfloat16()
    rotary = model.model.rotary_emb
    exact = methods.from_hf_config(model.config).inv_freq.double()
    off = float((rotary.inv_freq.bfloat16().double() - exact).abs().max())
    rotary.inv_freq = rotary.inv_freq.bfloat16()
    (rotation,) = check(model).rotations
    if off * (2 * length - 1) < 0.005:  # beside the roundings of cosines, up to 0.004
        assert rotation.ok and rotation.rounded is None
    if off * (2 * length - 1) > 0.02:
        assert not rotation.ok and rotation.shows_from == math.ceil(0.01 / off)


def test_a_configuration_edited_after_loading_changes_nothing():
    edited, replaced = llama(PLAIN), llama(PLAIN)
    edited.config.rope_parameters.update(YARN)
    replaced.config = llama().config
    for model in (edited, replaced):
        (line,) = lines(model)
        assert line == (
            "all layers: other frequencies (1 to 4 times those stated), "
            f"amplitude 1 where 1.14 is stated{NOT_YARN}"
        )


def test_a_scaling_under_a_wrong_key_is_ignored():
    stated, ignored = lines(llama(PLAIN, rope_params=YARN))
    assert stated.startswith("all layers: as stated (plain RoPE, base 10000)")
    assert ignored == "rope_params is in the configuration, and nothing reads it"
    text = build("Qwen3VLForConditionalGeneration")
    assert check(text).ok
    text.config.rope_parameters = YARN  # beside the language model's
    assert check(text).ignored == ("rope_parameters beside the language model's part",)


@pytest.mark.parametrize(
    ("inv_freq", "amplitude", "said"),
    [
        (
            methods.pi(64, factor=4.0),
            1.0,
            "other frequencies (0.25 to 1 times those stated), amplitude 1 where 1.14 is stated",
        ),
        (methods.pi(64, factor=4.0), AMPLITUDE, "other frequencies (0.25 to 1 times those stated)"),
        (methods.rope(64, base=5e5), AMPLITUDE, "other frequencies (0.0"),
        (None, AMPLITUDE**2, "the stated frequencies, amplitude 1.3 where 1.14 is stated"),
        (None, 1.0, "the stated frequencies, amplitude 1 where 1.14 is stated"),
        (methods.nope(64), AMPLITUDE, "no rotation at all: all frequencies are 0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_trainer_or_a_second_engine_put_in_place_is_measured(
    inv_freq, amplitude, said, dtype
):
    """Linear scaling in place of the model's own, another base, the amplitude twice or lost."""
    model = llama().to(dtype)
    rotary = model.model.rotary_emb
    yarn = methods.from_hf_config(model.config).inv_freq
    rotary.inv_freq = yarn if inv_freq is None else inv_freq.inv_freq
    rotary.attention_scaling = amplitude
    (line,) = lines(model)
    assert line.startswith(f"all layers: {said}") and line.endswith(NOT_YARN)


def test_a_base_edited_after_loading_and_one_kind_of_layers_alone():
    model = llama(PLAIN)
    model.config.rope_parameters["rope_theta"] = 5e5
    (line,) = lines(model)
    assert line.startswith("all layers: other frequencies (1 to ")
    gemma = build("Gemma3ForCausalLM")
    rotary = next(each for each in gemma.modules() if hasattr(each, "full_attention_inv_freq"))
    rotary.full_attention_inv_freq.mul_(0.5)
    told = {each.kind: each.in_force for each in check(gemma).rotations}
    assert told["full_attention"] == "other frequencies (0.5 to 0.5 times those stated)"
    assert told["sliding_attention"] == "as stated"


def test_a_model_saved_as_extended_that_is_not_is_told(tmp_path):
    handle = extend(llama(PLAIN), "rerope", window=512)
    with pytest.warns(UserWarning, match="without it"):
        handle.save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not check(model).ok and lines(model)[-1] == (
        f"saved as extended, and is not; extend_from_saved(model, {str(tmp_path)!r}) restores it"
    )
    with ours.extend_from_saved(model, tmp_path):
        assert check(model).ok
    for method in ("yarn", "pi"):  # whose configuration says all
        with extend(llama(PLAIN), method, factor=2.0) as handle:
            handle.save_pretrained(tmp_path / method)
        assert check(transformers.LlamaForCausalLM.from_pretrained(tmp_path / method)).ok


@pytest.mark.parametrize("load", ["peft", "auto", "transformers"])
def test_an_adapter_saved_as_extended_on_a_plain_model_is_told(load, tmp_path):
    """PEFT's adapters do not tell their folder: their configuration has a mark."""
    peft = pytest.importorskip("peft")
    llama(PLAIN).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    model.add_adapter("second", settings)
    with extend(model, "rerope", window=512):
        model.save_pretrained(tmp_path / "tuned")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    folder, name = tmp_path / "tuned", "default"
    if load == "peft":
        folder, name = folder / "second", "second"
        loaded = peft.PeftModel.from_pretrained(plain, folder, adapter_name=name)
    elif load == "auto":
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        (loaded := plain).load_adapter(folder)
    assert not check(loaded).ok and lines(loaded)[-1] == (
        f"adapter {name!r} was saved as extended by rerope window=512, and the model is not; "
        "extend_from_saved(model, folder) restores it, by the adapter's folder"
    )
    with ours.extend_from_saved(loaded, tmp_path / "tuned"):
        assert check(loaded).ok
    model.save_pretrained(tmp_path / "plain")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert check(peft.PeftModel.from_pretrained(plain, tmp_path / "plain")).ok


def test_values_that_are_not_finite_are_told():
    model = llama()
    model.model.rotary_emb.inv_freq.fill_(float("nan"))  # as of memory that nothing filled
    assert lines(model) == [f"all layers: cosines are not finite{NOT_YARN}"]


def test_frequencies_that_do_not_follow_the_length_are_told():
    model = llama(LONGROPE)
    model.model.rotary_emb.rope_type = "default"
    (line,) = lines(model)
    assert line.startswith("all layers: as stated up to position 1,023, other frequencies past it")


def test_an_extension_in_place_is_named():
    model = llama()
    with extend(model, "yarn", factor=8.0):
        assert lines(model) == ["all layers: extended by yarn factor=8.0"]
        with extend(model, "rerope", window=512):
            assert lines(model) == [
                "all layers: extended by rerope window=512 over yarn factor=8.0"
            ]
    assert lines(model)[0].startswith("all layers: as stated")
    gemma = build("Gemma3ForCausalLM")
    with extend(gemma, "yarn", factor=2.0):
        kinds = {each.kind: each.in_force for each in check(gemma).rotations}
    assert kinds["full_attention"] == "extended by yarn factor=2.0"
    assert kinds["sliding_attention"] == "as stated"


def test_frequencies_that_are_weights_are_never_as_stated_and_extended_as_learned():
    """Mistral Large 4: each frequency times exp(alpha); queries times the log of their position."""
    model = build("MistralLarge4ForConditionalGeneration")
    rotary = next(each for each in model.modules() if hasattr(each, "alpha"))
    pairs, ids = len(rotary.inv_freq), torch.arange(12)[None]
    with torch.no_grad():
        rotary.alpha.normal_(0, 0.3)
        (rotation,) = check(model).rotations
        said = (
            f"{rotary.alpha.exp().min():.3g} to {rotary.alpha.exp().max():.3g} times those stated"
        )
        assert rotation.in_force == (
            f"frequencies are weights (alpha): {said} (plain RoPE, base 10000)"
        )
        plain = model(input_ids=ids).logits
        with extend(model, "rope"):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with extend(model, "yarn", factor=2.0):
            extended = model(input_ids=ids).logits
        with extend(model, length=128) as handle:
            assert torch.equal(model(input_ids=ids).logits, extended), handle
        learned = methods.RopeFreqs(rotary.inv_freq * rotary.alpha.exp())
        yarn = methods.yarn(
            2 * pairs, factor=2.0, original_max_position_embeddings=64, over=learned
        )
        rotary.inv_freq = yarn.inv_freq / rotary.alpha.exp()
        rotary.attention_scaling = yarn.attention_factor
        assert (extended - plain).abs().max() > 0.1
        torch.testing.assert_close(model(input_ids=ids).logits, extended)


def test_a_folder_of_learned_frequencies_has_them_once(tmp_path):
    model, ids = build("MistralLarge4ForConditionalGeneration"), torch.arange(12)[None]
    with extend(model, "yarn", factor=2.0) as handle, torch.no_grad():
        extended = model(input_ids=ids).logits
        with pytest.warns(UserWarning, match=r"config\.json in .* is without it"):
            handle.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with ours.extend_from_saved(again, tmp_path), torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, extended)


def test_who_may_be_checked():
    assert extrope_kernels.check is check
    with pytest.raises(TypeError, match=r"check: model must be a loaded .* extrope check smollm2"):
        check("smollm2")
    with pytest.raises(ValueError, match=r"check: model must have a rotary embedding .* Linear"):
        check(torch.nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(ValueError, match="check: model must have its values"):
        check(llama())


def test_a_wrapper_is_looked_through():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    report = check(model)
    assert report.ok and report.model == "LlamaForCausalLM"
