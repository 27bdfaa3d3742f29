"""A sample of the models of bench/models_census.py, and what sets families apart."""

from __future__ import annotations

import models_census
import pytest
import torch
from support import tiny_models
from support.hf_models import build, error, generate, logits, since, tokens, transformers

from extrope_kernels.integrations.transformers import attention as ours
from extrope_kernels.integrations.transformers import extend
from extrope_kernels.integrations.transformers import layers as probe
from extrope_kernels.integrations.transformers.attention import ExtendedLayer

# One of each kind of architecture, and others of them.
SERVED = [
    "DeepseekV3ForCausalLM",  # latent attention
    "Ernie4_5_VLMoeForConditionalGeneration",  # axes of positions, frequencies in another order
    "Gemma3ForConditionalGeneration",  # a rotation for each kind of layers
    "Gemma3nForCausalLM",  # layers that reuse keys
    "GptOssForCausalLM",  # sinks
    "Lfm2MoeForCausalLM",  # convolutions
    "MiniMaxForCausalLM",  # linear attention
    "Qwen2VLForConditionalGeneration",
]
ALIKE = [
    *("ApertusForCausalLM", "DeepseekV2ForCausalLM", "Gemma2ForCausalLM"),
    *("FalconForCausalLM", "Gemma4ForCausalLM", "Glm4MoeLiteForCausalLM", "GlmForCausalLM"),
    *("LlavaForConditionalGeneration", "NanoChatForCausalLM", "NemotronForCausalLM"),
    *("PhimoeForCausalLM", "StableLmForCausalLM"),
    *("Qwen3VLForConditionalGeneration", "Qwen3_5ForCausalLM", "SmolLM3ForCausalLM"),
]
REFUSED = {
    "Cohere2ForCausalLM": "all its layers that rotate have a sliding window or chunks",
    "DeepseekV4ForCausalLM": "keys beside those of the tokens, which have no distance",
    "Exaone4ForCausalLM": "all its layers that rotate have a sliding window or chunks",
    "GPTNeoXJapaneseForCausalLM": "rotates and weighs keys itself",
    "HunYuanDenseV1ForCausalLM": "makes its logits depend on more than distances",
    "Llama4ForCausalLM": "all its layers that rotate have a sliding window or chunks",
    "MistralForCausalLM": "all its layers that rotate have a sliding window or chunks",
}
# Layers that get a mask among several, or have a state beside the attention.
OWN_WAYS = ("ZayaForCausalLM", "FalconH1ForCausalLM")
SINCE = {
    **dict.fromkeys(
        ("Lfm2MoeForCausalLM", "FalconH1ForCausalLM", "Qwen3NextForCausalLM"),
        ("5.5", "hybrid models have caches that are no Cache"),
    ),
    "FalconForCausalLM": ("5.25", "its layers compute their attention themselves"),
}
IDS = tokens(2, 20).clamp(max=99)
PADS = 7
PADDED, MASK = IDS.clone(), torch.ones_like(IDS)
PADDED[1, :PADS] = MASK[1, :PADS] = 0


def _skip_what_is_missing(name):
    if name in SINCE:
        since(*SINCE[name])
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def _build(name, **settings):
    _skip_what_is_missing(name)
    return tiny_models.build(name, **settings)


def _assert_close(got, want):
    """But for the roundings of a float32 model: none is off by more than 1e-4 of the largest."""
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    "name", [*SERVED, *(pytest.param(each, marks=pytest.mark.thorough) for each in ALIKE)]
)
def test_a_model_is_served(name):
    _skip_what_is_missing(name)
    row = models_census.census(name)
    assert {key: said for key, said in row.items() if not said.startswith("ok")} == {"name": name}


@pytest.mark.parametrize("name", REFUSED)
def test_a_score_method_says_why_not(name):
    _skip_what_is_missing(name)
    row = models_census.census(name)
    for method in models_census.FREQUENCIES:
        assert row[method] == "ok"
    for method in models_census.SCORES:
        assert REFUSED[name] in row[method]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7}


def test_latent_attention_takes_the_temperature_into_its_softmax_scale():
    length = {"original_max_position_embeddings": 64}
    plain, theirs = (
        tiny_models.build("DeepseekV3ForCausalLM", rope_parameters=rope)
        for rope in ({"rope_type": "default", "rope_theta": 1e4}, length | YARN)
    )
    ids = tokens(2, 40)
    want, without = logits(theirs, ids), logits(plain, ids)
    assert error(want, without) > 1e-2
    with extend(plain, "yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.7):
        torch.testing.assert_close(logits(plain, ids), want, atol=1e-4, rtol=1e-4)
    # From the configuration, where it has them; by other methods it goes.
    with extend(theirs, "yarn", factor=4.0):
        torch.testing.assert_close(logits(theirs, ids), want, atol=1e-4, rtol=1e-4)
        with extend(theirs, "rope"):
            torch.testing.assert_close(logits(theirs, ids), without, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match=r"mscale_all_dim must be 0 for dynamic_yarn of Deep"):
            extend(theirs, "dynamic_yarn")
    assert torch.equal(logits(theirs, ids), want)


def test_latent_attention_reads_keys_where_they_are(monkeypatch):
    """Its rotated dims are the last of a head: nothing is copied to bring them to the front."""
    model, given, read = tiny_models.build("DeepseekV3ForCausalLM"), [], []
    attend, decode = ExtendedLayer.attend, ours.rope_attention_with_kvcache

    def note_given(self, module, q, k, *others):
        given.append(k.data_ptr())
        return attend(self, module, q, k, *others)

    def note_read(q, k, *others, **call):
        read.append(k.data_ptr())
        return decode(q, k, *others, **call)

    with extend(model, "rerope", window=8):
        monkeypatch.setattr(ExtendedLayer, "attend", note_given)
        monkeypatch.setattr(ours, "rope_attention_with_kvcache", note_read)
        generate(model, IDS, max_new_tokens=3)
    assert len(read) == 2 * len(model.model.layers) and read == given[-len(read) :]


def test_two_rotations_in_one_model():
    def scaled(**factors):
        rope = {
            kind: {"rope_type": "linear" if kind in factors else "default", "rope_theta": theta}
            | ({"factor": factors[kind]} if kind in factors else {})
            for kind, theta in (("full_attention", 1e4), ("sliding_attention", 1e3))
        }
        config = build("gemma3_text").config
        config.rope_parameters = rope
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM._from_config(config, dtype=torch.float32).eval()

    model, ids = scaled(), tokens(2, 40)
    for layers, factors in (
        ("full", {"full_attention": 4.0}),
        ("all", {"full_attention": 4.0, "sliding_attention": 4.0}),
    ):
        want = logits(scaled(**factors), ids)
        with extend(model, "pi", factor=4.0, layers=layers):
            torch.testing.assert_close(logits(model, ids), want, atol=1e-4, rtol=1e-4)
        assert error(want, logits(model, ids)) > 1e-2


def test_several_axes_of_positions():
    def qwen(rope):
        config = tiny_models.tiny_config(transformers.Qwen2VLConfig)
        config.text_config.rope_parameters |= rope
        torch.manual_seed(0)
        cls = transformers.Qwen2VLForConditionalGeneration
        return cls._from_config(config, dtype=torch.float32).eval()

    model, theirs = qwen({}), qwen({"rope_type": "linear", "factor": 4.0})
    ids, at = tokens(1, 24).clamp(max=99), torch.arange(24)
    inputs = {"position_ids": torch.stack([at, at // 4, at % 4])[:, None]}
    want = logits(theirs, ids, **inputs)
    with extend(model, "pi", factor=4.0):
        torch.testing.assert_close(logits(model, ids, **inputs), want, atol=1e-4, rtol=1e-4)
    assert error(want, logits(model, ids, **inputs)) > 1e-2
    with (
        extend(model, "rerope", window=8),
        pytest.raises(ValueError, match="refuse tokens with several positions, as images have"),
    ):
        logits(model, ids, **inputs)


@pytest.mark.parametrize("name", OWN_WAYS)
def test_padded_rows_generate_what_they_do_alone(name):
    model = _build(name)
    plain = logits(model, IDS)
    with extend(model, "rerope", window=64):
        _assert_close(logits(model, IDS), plain)
    with extend(model, "rerope", window=6):
        got = generate(model, PADDED, attention_mask=MASK, max_new_tokens=3)
        slots = torch.arange(IDS.shape[1])[None]
        by_slots = logits(model, PADDED, attention_mask=MASK, position_ids=slots)
        _assert_close(by_slots[:, -1], got[:, 0])
        for row, pads in enumerate((0, PADS)):
            alone = PADDED[row : row + 1, pads:]
            want = generate(model, alone, max_new_tokens=3)
            _assert_close(got[row : row + 1], want)
            chosen = torch.cat((alone, want[:, :-1].argmax(-1)), 1)
            _assert_close(logits(model, chosen)[:, -3:], want)
    assert torch.equal(logits(model, IDS), plain)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "FalconH1ForCausalLM"])
def test_padding_of_a_hybrid_with_a_static_cache(name):
    """What is padding is read from the mask's last columns by layers without keys."""
    model = _build(name)
    with extend(model, "rerope", window=6):
        want, got = (
            generate(model, PADDED, attention_mask=MASK, max_new_tokens=4, **settings)
            for settings in ({}, {"cache_implementation": "static"})
        )
    _assert_close(got, want)


@pytest.mark.parametrize("name", ["PhimoeForCausalLM", "MoshiForCausalLM"])
def test_a_window_that_the_cache_alone_knows(name):
    """Their layers tell their attention of none."""
    model = _build(name, sliding_window=8)
    with pytest.raises(ValueError, match="all its layers that rotate have a sliding window"):
        extend(model, "rerope", window=6)


def test_windows_and_chunks_are_left_to_frequencies():
    for name in ("Llama4ForCausalLM", "Gemma2ForCausalLM"):
        with pytest.raises(ValueError, match="layers must be 'full' for rerope, got 'all'"):
            extend(_build(name), "rerope", window=6, layers="all")


def test_a_norm_after_the_rotation_undoes_the_attention_factor():
    model, yarn = _build("NanoChatForCausalLM"), {"method": "yarn", "factor": 4.0}
    with extend(model, **yarn):
        want = logits(model, IDS)
        with extend(model, "rerope", window=64):
            _assert_close(logits(model, IDS), want)
    with extend(model, **yarn, cache="raw"):
        _assert_close(logits(model, IDS), want)


@pytest.mark.parametrize("name", ["ModernBert", "EuroBert", "NomicBert", "JinaEmbeddingsV3"])
def test_encoders_take_frequency_methods(name):
    model = _build(f"{name}ForMaskedLM")
    plain = logits_of(model)
    with extend(model, "rope", layers="all"):
        _assert_close(logits_of(model), plain)
    with extend(model, length=4 * tiny_models.TRAINED) as handle:
        assert handle.method == "yarn" and "is not causal" in handle.reason
        assert error(logits_of(model), plain) > 0.1
    assert torch.equal(logits_of(model), plain)


@torch.no_grad()
def logits_of(encoder):
    return encoder(input_ids=IDS).logits


def test_an_indexer_with_a_rotation_of_its_own_keeps_tables():
    model = _build("Qwen4ExpForCausalLM")
    plain = logits(model, IDS)
    with extend(model, "rope"):
        _assert_close(logits(model, IDS), plain)


def test_a_probe_that_fails_changes_nothing(monkeypatch):
    model = _build("LlamaForCausalLM")
    plain = logits(model, IDS)

    def fail(owner):
        raise KeyError("sliding_attention")

    monkeypatch.setattr(probe, "run_on_four_tokens", fail)
    with pytest.raises(ValueError, match=r"cannot be tried out on four tokens .'sliding_attention"):
        extend(model, "rerope", window=6)
    monkeypatch.undo()
    assert torch.equal(logits(model, IDS), plain)
    extend(model, "rerope", window=6).restore()


def test_masks_by_other_names():
    model = _build("ZayaForCausalLM")
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with extend(model, "rerope", window=6):
        want = logits(model, IDS)
        masks = dict.fromkeys(("hybrid", "hybrid_sliding", "conv"))
        assert torch.equal(logits(model, IDS, attention_mask=masks), want)
        assert torch.equal(logits(model, IDS, attention_mask={**masks, "hybrid": mask}), want)
