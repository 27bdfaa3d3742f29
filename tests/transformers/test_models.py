"""A sample of the models of bench/models_census.py, and what sets single families apart."""

from __future__ import annotations

import models_census
import pytest
import tiny_models
import torch
from hf_models import (
    build,
    error,
    logits,
    one_thread,  # noqa: F401
    since,
    tokens,
    transformers,
)

from extrope_kernels.integrations.transformers import extend

SERVED = [
    "ApertusForCausalLM",
    "Cohere2ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForCausalLM",
    "Gemma4ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmForCausalLM",
    "GptOssForCausalLM",
    "Lfm2MoeForCausalLM",
    "Llama4ForCausalLM",
    "LlavaForConditionalGeneration",
    "MiniMaxForCausalLM",
    "MistralForCausalLM",
    "NanoChatForCausalLM",
    "NemotronForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
]
REFUSED = {
    "DeepseekV4ForCausalLM": "keys beside those of the tokens, which have no distance",
    "HunYuanDenseV1ForCausalLM": "makes its logits depend on more than distances",
}


def _row(name):
    if name == "Lfm2MoeForCausalLM":
        since("5.5", "hybrid models have caches that are no Cache")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return models_census.census(name)


@pytest.mark.parametrize("name", SERVED)
def test_a_model_is_served(name):
    row = _row(name)
    assert {key: said for key, said in row.items() if not said.startswith("ok")} == {"name": name}


@pytest.mark.parametrize("name", REFUSED)
def test_a_score_method_says_why_not(name):
    row = _row(name)
    for method in models_census.FREQUENCIES:
        assert row[method] == "ok"
    for method in models_census.SCORES:
        assert REFUSED[name] in row[method]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7}


def _deepseek(parameters):
    config = tiny_models.tiny_config(transformers.DeepseekV3Config)
    config.rope_parameters = {"original_max_position_embeddings": 64, **parameters}
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM._from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("version", ["5.15", "before"])
def test_latent_attention_takes_the_temperature_into_its_softmax_scale(monkeypatch, version):
    plain, theirs = _deepseek({"rope_type": "default", "rope_theta": 1e4}), _deepseek(YARN)
    if version == "before":
        modeling = transformers.models.deepseek_v3.modeling_deepseek_v3
        monkeypatch.delattr(modeling, "yarn_apply_mscale", raising=False)
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
    assert torch.equal(logits(theirs, ids), want)


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
    with pytest.raises(ValueError, match="extend: layers must be full or all, got 'some'"):
        extend(model, "rope", layers="some")


def test_several_axes_of_positions():
    def qwen(rope):
        config = tiny_models.tiny_config(transformers.Qwen2VLConfig)
        config.text_config.rope_parameters |= rope
        torch.manual_seed(0)
        cls = transformers.Qwen2VLForConditionalGeneration
        return cls._from_config(config, dtype=torch.float32).eval()

    model, theirs = qwen({}), qwen({"rope_type": "linear", "factor": 4.0})
    ids = tokens(1, 24).clamp(max=99)
    positions = torch.stack([torch.arange(24), torch.arange(24) // 4, torch.arange(24) % 4])[
        :, None
    ]
    inputs = {"position_ids": positions}
    want = logits(theirs, ids, **inputs)
    with extend(model, "pi", factor=4.0):
        torch.testing.assert_close(logits(model, ids, **inputs), want, atol=1e-4, rtol=1e-4)
    assert error(want, logits(model, ids, **inputs)) > 1e-2
    with (
        extend(model, "rerope", window=8),
        pytest.raises(ValueError, match="tokens with several positions, as images have"),
    ):
        logits(model, ids, **inputs)


@pytest.mark.parametrize("method", [("yarn", {"factor": 4.0}), ("rerope", {"window": 8})])
def test_a_rotary_embedding_that_insists_on_its_axes(monkeypatch, method):
    """Qwen2-VL's takes no positions of one axis, before transformers 5.19."""
    rotary = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLRotaryEmbedding
    forward = rotary.forward

    def insist(self, x, position_ids):
        position_ids[:, :, None, :]
        return forward(self, x, position_ids.expand(3, -1, -1))

    name, parameters = method
    model, ids = tiny_models.build("Qwen2VLForConditionalGeneration"), tokens(1, 24).clamp(max=99)
    plain = logits(model, ids)
    with extend(model, name, **parameters):
        want = logits(model, ids)
    monkeypatch.setattr(rotary, "forward", insist)
    with extend(model, name, **parameters):
        got = logits(model, ids, position_ids=torch.arange(24).expand(3, 1, -1))
    assert torch.equal(got, want) and error(got, plain) > 1e-3
