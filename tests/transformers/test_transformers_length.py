"""`extend` told a length: the method that it chooses, and the factor of a named one."""

import warnings

import pytest
import torch
from support import tiny_models
from support.hf_models import TRAINED, build, logits, tokens, transformers

from extrope_kernels.integrations.transformers import extend

ORIGINAL = "original_max_position_embeddings"
CHUNKS = {"chunk_size": 16, "local_size": 4, ORIGINAL: 24}
YARN_IN_FILE = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: TRAINED // 4}


def chosen(model, length, **given):
    """The method with its parameters, and the reason."""
    with extend(model, length=length, **given) as handle:
        return handle.method, handle.applied.parameters, handle.reason


@pytest.mark.parametrize(
    ("rope", "length"),
    # A YaRN of the file reaches four times the length that its factor is counted from.
    [(None, 100), (YARN_IN_FILE, 64)],
)
def test_the_method_is_the_one_that_measured_best(rope, length):
    method, parameters, reason = chosen(build("llama", rope), length)
    assert (method, parameters) == ("rerope", {"window": TRAINED // 2})
    assert "exact within its window, half of 32" in reason


@pytest.mark.parametrize(("length", "factor"), [(160, 16.0), (1024, 63.0)])
@pytest.mark.filterwarnings("ignore:extend. length 1,024 is 32 times")
def test_far_past_the_training_the_farthest_distance_is_a_trained_one(length, factor):
    method, parameters, _ = chosen(build("llama"), length)
    window = TRAINED // 2
    assert (method, parameters) == ("leaky_rerope", {"window": window, "factor": factor})
    assert window + (length - window) / factor <= TRAINED


@pytest.mark.parametrize(
    ("length", "times", "warns"), [(256, None, 0), (257, "9", 0), (512, "16", 0), (513, "17", 1)]
)
def test_what_was_measured_less_far_says_so(length, times, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reason = chosen(build("llama"), length)[2]
    if times is None:
        assert "at 8 times its length: " in reason
    else:
        assert f"at up to 8 times its length (this is {times} times): " in reason
    told = f"extend: length {length} is 17 times the 32 tokens that the model reaches; methods are"
    assert [str(each.message).startswith(told) for each in caught] == [True] * warns
    assert {each.filename for each in caught} <= {__file__}


def test_a_length_as_on_the_command_line():
    with extend(build("llama"), "yarn", length="1k") as handle:
        assert handle.applied.parameters == {"factor": 32.0}


LONG = {"rope_type": "longrope", ORIGINAL: 16, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}


@pytest.mark.parametrize("rope", [None, {**YARN_IN_FILE, "truncate": False}, LONG], ids=str)
def test_a_model_that_reaches_the_length_stays_as_it_is(rope):
    model, ids = build("llama", rope), tokens(1, 20)
    plain = logits(model, ids)
    with extend(model, length=30 if rope is not None else TRAINED) as handle:
        torch.testing.assert_close(logits(model, ids), plain)
        length = 30 if rope is not None else TRAINED
        told = f"nothing changed: {length} tokens are within the 32 that the model reaches"
        assert repr(handle) == told


def test_chunks_of_the_training_are_kept():
    """transformers has none of them, so its model reaches no further than before them."""
    model = build("qwen2", dual_chunk_attention_config=CHUNKS)
    with pytest.warns(UserWarning, match="the sparse part"):
        name, _, why = chosen(model, TRAINED)
    assert name == "dual_chunk" and why.startswith("as it was trained")


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("HunYuanDenseV1ForCausalLM", "yarn", "no score method: what HunYuanDenseV1Attention does"),
        ("Qwen2VLForConditionalGeneration", "yarn", "tokens of images have several positions"),
        ("Gemma3ForConditionalGeneration", "yarn", "tokens of an image see one another"),
        ("Cohere2ForCausalLM", "rope", "nothing changed: all its layers that rotate have a sl"),
        ("BeamForCausalLM", "rope", "nothing changed: all its layers that rotate have a sl"),
    ],
)
def test_a_model_that_no_score_method_suits_gets_yarn(name, method, reason):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = tiny_models.build(name)
    ids = tokens(1, 20).clamp(max=99)
    plain = logits(model, ids)
    with extend(model, length=4 * tiny_models.TRAINED) as handle:
        parameters = {"factor": 4.0} if method == "yarn" else {}
        assert (handle.method, handle.applied.parameters) == (method, parameters)
        assert reason in repr(handle)
        if method == "rope":
            torch.testing.assert_close(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), plain)


def test_a_score_method_says_at_once_that_it_takes_no_images():
    model = tiny_models.build("Qwen2VLForConditionalGeneration")
    with pytest.warns(UserWarning, match="extend: rerope takes text without images: tokens of i"):
        extend(model, "rerope", window=8).restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extend(model, "yarn", factor=2.0).restore()
        extend(tiny_models.build("LlavaForConditionalGeneration"), "rerope", window=8).restore()


def test_a_model_without_a_length_needs_it():
    model = tiny_models.build("RecurrentGemmaForCausalLM")
    with pytest.raises(ValueError, match=f"extend: {ORIGINAL} must be given with length for Recur"):
        extend(model, length=100)
    with extend(model, length=100, **{ORIGINAL: 40}) as handle:
        assert (handle.method, handle.applied.parameters) == ("rope", {}) and not handle.changes


def test_a_named_method_gets_its_factor():
    model, ids = build("llama"), tokens(1, 50)
    with extend(model, "yarn", factor=3.0):
        want = logits(model, ids)
    with extend(model, "yarn", length=3 * TRAINED) as handle:
        assert torch.equal(logits(model, ids), want) and handle.length == 3 * TRAINED
    model = build("llama", YARN_IN_FILE)
    with extend(model, "yarn", length=64) as handle:
        assert handle.applied.parameters == {"factor": 8.0}


def test_an_extended_model_is_not_measured_again():
    model = build("llama")
    message = "got one extended by yarn; restore that one first, or name the method"
    with extend(model, "yarn", factor=2.0), pytest.raises(ValueError, match=message):
        extend(model, length=500)


def test_a_length_of_the_training_gets_a_warning_at_the_callers_line():
    message = "extend: the model was trained to 32 tokens, which length 32 does not exceed"
    for method in (None, "yarn"):
        with pytest.warns(UserWarning, match=message) as warned:
            extend(build("llama"), method, length=TRAINED).restore()
        assert warned[0].filename == __file__


@pytest.mark.thorough  # most of its minutes go into building models
def test_every_class_gets_a_choice_that_it_takes():
    for name in tiny_models.rotary_classes():
        try:
            model = tiny_models.build(name)
        except ImportError:  # a tower of another package
            continue
        known = hasattr(model.config.get_text_config(decoder=True), "max_position_embeddings")
        given = {} if known else {ORIGINAL: tiny_models.TRAINED}
        with extend(model, length=4 * tiny_models.TRAINED, **given) as handle:
            assert handle.reason, name
