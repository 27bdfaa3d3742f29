"""`by_axis`: a method for some axes of mRoPE, in numbers and in models that see images."""

import pytest
import torch
from support import tiny_models
from support.hf_models import build, logits, tokens, transformers

from extrope_kernels import RopeFreqs, methods
from extrope_kernels.integrations.transformers import extend, extend_from_saved

LENGTH = "original_max_position_embeddings"
AXES = "thw"
# By model: its sections, whether they are interleaved, and the axis of each pair.
MODELS = {
    "Qwen2_5_VL": ([2, 3, 3], False, "tthhhwww"),
    "Qwen3VL": ([4, 2, 2], True, "thwthwtt"),
}
over_models = pytest.mark.parametrize("name", MODELS)


def trained(name):
    sections, interleaved, _ = MODELS[name]
    return methods.with_sections(methods.rope(16), sections, interleaved=interleaved)


def expected(name, method, axes):
    """The method's frequencies for pairs of these axes, plain RoPE's for the others."""
    changed = torch.tensor([AXES.index(axis) in axes for axis in MODELS[name][2]])
    return torch.where(changed, method.inv_freq, methods.rope(16).inv_freq)


@over_models
@pytest.mark.parametrize("axes", [[0], [1, 2], (2,)])
def test_a_pair_rotates_by_the_method_of_its_axis(name, axes):
    over = trained(name)
    yarn = methods.yarn(16, factor=4.0, **{LENGTH: 64})
    freqs = methods.by_axis(yarn, axes, over=over)
    assert torch.equal(freqs.inv_freq, expected(name, yarn, axes))
    assert torch.equal(freqs.axes, over.axes)
    assert freqs.attention_factor == yarn.attention_factor > 1.1


def test_rows_of_a_batch_have_their_own_frequencies():
    lengths = {"factor": 2.0, "max_position_embeddings": 64}
    over = trained("Qwen3VL")
    rows = methods.dynamic_ntk(16, **lengths, seq_len=torch.tensor([50, 500]))
    for length, row in zip((50, 500), methods.by_axis(rows, [1], over=over).inv_freq):
        alone = methods.dynamic_ntk(16, **lengths, seq_len=length)
        assert torch.equal(row, methods.by_axis(alone, [1], over=over).inv_freq)


def test_height_and_width_by_a_larger_base_are_those_of_giraffe():
    """In its code time rotates as trained, and a base for the ratio of lengths serves the rest."""
    trained_to, reached, pairs = 16384, 65536, torch.arange(64).double()
    factor = (reached - 1) / (trained_to - 1)
    larger = 1e6 * factor ** (128 / 126)
    want = torch.where(pairs < 16, 1e6 ** (-pairs / 64), larger ** (-pairs / 64))
    over = methods.with_sections(methods.rope(128, base=1e6), [16, 24, 24])
    freqs = methods.by_axis(methods.ntk_aware(128, factor=factor, base=1e6), [1, 2], over=over)
    torch.testing.assert_close(freqs.inv_freq.double(), want, rtol=1e-6, atol=0)
    assert freqs.attention_factor == 1.0


def test_yarn_leaves_time_alone_where_it_has_the_fastest_pairs():
    """As in Qwen2.5-VL: time alone is then plain RoPE with YaRN's amplitude."""
    over = methods.with_sections(methods.rope(128, base=1e6), [16, 24, 24])
    yarn = methods.yarn(128, factor=4.0, base=1e6, **{LENGTH: 32768})
    assert torch.equal(methods.by_axis(yarn, [0], over=over).inv_freq, over.inv_freq)
    assert torch.equal(methods.by_axis(yarn, [1, 2], over=over).inv_freq, yarn.inv_freq)


def seeing(name, freqs=None):
    """A model that sees images, plain or with the buffers of other frequencies."""
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    config = tiny_models.tiny_config(cls.config_class)
    config.text_config.rope_parameters |= {"mrope_section": MODELS[name][0], "rope_theta": 1e4}
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    if freqs is not None:
        rotary = model.model.language_model.rotary_emb
        rotary.inv_freq.copy_(freqs.inv_freq)
        rotary.attention_scaling = freqs.attention_factor
    return model


IDS = tokens(1, 48).clamp(max=99)
AT = torch.arange(48)
PROMPTS = {"text": {}, "images": {"position_ids": torch.stack([AT, AT // 4, AT % 4])[:, None]}}


@pytest.mark.parametrize("name, axes", [("Qwen2_5_VL", [0]), ("Qwen3VL", [1, 2])])
def test_a_model_is_the_plain_one_with_these_frequencies(name, axes, tmp_path):
    yarn = methods.yarn(16, factor=4.0, **{LENGTH: tiny_models.TRAINED})
    freqs = RopeFreqs(expected(name, yarn, axes), yarn.attention_factor)
    model, theirs, whole = seeing(name), seeing(name, freqs), seeing(name, yarn)
    for inputs in PROMPTS.values():
        want = logits(theirs, IDS, **inputs)
        with extend(model, "yarn", factor=4.0, by_axis=axes) as handle:
            torch.testing.assert_close(logits(model, IDS, **inputs), want, rtol=1e-4, atol=1e-4)
            handle.save_pretrained(tmp_path)
        for other in (model, whole):
            assert (logits(other, IDS, **inputs) - want).abs().max() > 1e-2
        for again in (seeing(name), type(model).from_pretrained(tmp_path).eval()):
            with extend_from_saved(again, tmp_path):
                got = logits(again, IDS, **inputs)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_model_without_such_axes_is_refused():
    with pytest.raises(ValueError, match=r"^extend: by_axis must be left out .*, got \[0\]"):
        extend(build("llama"), "yarn", factor=4.0, by_axis=[0])
    with pytest.raises(ValueError, match=r"^by_axis: axes must be among 0, 1, 2, .*, got \[3\]"):
        extend(seeing("Qwen3VL"), "yarn", factor=4.0, by_axis=[3])


def test_sections_go_around_frequencies_of_each_sequence():
    lengths = torch.tensor([32, 256, 300])
    freqs = methods.dynamic_ntk(16, factor=2.0, max_position_embeddings=64, seq_len=lengths)
    found = methods.with_sections(freqs, [4, 2, 2])
    assert found.axes.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert torch.equal(found.inv_freq, freqs.inv_freq)
