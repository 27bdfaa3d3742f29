"""What the score methods of `extend` refuse, and what they leave alone."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from hf_models import (
    build,
    logits,
    one_thread,  # noqa: F401
    tokens,
)

from extrope_kernels.integrations.transformers import extend
from extrope_kernels.testing import attention_backends

IDS = tokens(2, 40)
LLAMA4 = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "intermediate_size_mlp": 96,
    "num_local_experts": 2,
}


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("mistral", {}, "^extend: MistralModel is not a supported architecture: all its layers"),
        ("llama4_text", LLAMA4, "Llama4TextModel .* all its layers that rotate have a .* chunks"),
        (
            "llama",
            {"rope": {"rope_type": "dynamic", "factor": 2.0}},
            "its frequencies .dynamic. ch",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "Gemma3Attention is not causal"),
    ],
)
def test_score_methods_refuse_models_before_anything_is_changed(family, sizes, message):
    model = build(family, **sizes)
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        extend(model, "rerope", window=8)
    for module, attributes in zip(model.modules(), before):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is attributes[name] for name in attributes)


def test_score_methods_refuse_parts_that_count_bytes_and_patches():
    model = tiny_models.build("BltForCausalLM")
    with pytest.raises(
        ValueError, match=r"BltForCausalLM .* BltLocalEncoder, .*BltPatcher counts pos"
    ):
        extend(model, "rerope", window=8)


@pytest.mark.skipif("cpu" not in attention_backends(), reason="the reference takes any head_dim")
def test_score_methods_refuse_heads_that_the_kernels_do_not_take():
    model = build("llama", head_dim=12)
    with pytest.raises(ValueError, match="extend: head_dim must be a multiple of 8"):
        extend(model, "rerope", window=8)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_score_methods_refuse_packed_rows_in_a_mask(dtype):
    model = build("llama")
    mask = torch.block_diag(torch.ones(15, 15), torch.ones(25, 25)).tril().bool()[None, None]
    if dtype != torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
    refused = pytest.raises(ValueError, match=r"^extend: attention_mask must be of one sequence")
    with extend(model, "rerope", window=6), refused:
        logits(model, IDS, attention_mask=mask)


def test_score_methods_refuse_dropout():
    model = build("llama", attention_dropout=0.1)
    with extend(model, "rerope", window=8):
        logits(model, IDS)
        with pytest.raises(ValueError, match="extend: a model in training must have attention_dr"):
            model.train()(IDS)
    with pytest.raises(ValueError, match="must have attention_dropout 0, got"):
        extend(model, "rerope", window=8)


def test_a_layer_is_not_run_outside_of_its_model():
    model = build("llama")
    tables = model.model.rotary_emb(torch.zeros(1, 1, 64), torch.zeros(1, 1))
    with (
        extend(model, "rerope", window=8),
        pytest.raises(RuntimeError, match="LlamaAttention must"),
    ):
        model.model.layers[0].self_attn(torch.zeros(1, 1, 64), tables, None)


def test_score_methods_go_on_last_and_once():
    model = build("llama")
    with extend(model, "xpos"), pytest.raises(ValueError, match="without decay, got xpos"):
        extend(model, "rerope", window=8)
    with extend(model, "rerope", window=8):
        want = logits(model, IDS)
        for method in ("yarn", "dual_chunk"):
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
