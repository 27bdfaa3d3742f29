"""Models whose tokens have several positions, in engines that take text alone: they are equal."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import SIZES, engine, expected, generated, rms, tokens_of
from support.vllm_images import MODELS, OF_QWEN, VISION
from test_vllm_engines import RERO, YARN, configured

RAW = YARN | {"cache": "raw"}
NONE = {"image": 0, "video": 0}
SECTIONS = MODELS["Qwen3VL"][0]
HYBRID = {
    "rope_parameters": SECTIONS | {"partial_rotary_factor": 0.5},
    "partial_rotary_factor": 0.5,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),  # vLLM's on a CPU
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
}
FAMILIES = {
    "Qwen2_5_VL": ({"rope_parameters": MODELS["Qwen2_5_VL"][0]}, MODELS["Qwen2_5_VL"][1]),
    "Qwen3VL": ({"rope_parameters": SECTIONS}, MODELS["Qwen3VL"][1]),
    "Qwen3_5": (HYBRID, VISION | OF_QWEN | {"num_position_embeddings": 64}),
}


def build(name, folder, dtype=torch.float32):
    import transformers

    text, vision = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(
        text_config=SIZES | {"hidden_size": 128} | text, vision_config=vision
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "dtype", "methods", "extrope"),
    [
        ("Qwen2_5_VL", "float32", [RERO], {"score": RERO}),
        ("Qwen3VL", "float32", [YARN], RAW),
        ("Qwen3_5", "bfloat16", [YARN], YARN),
        ("Qwen3_5", "bfloat16", [RERO], {"score": RERO}),
        ("Qwen3_5", "bfloat16", [RERO], {"score": RERO, "cache": "raw"}),
    ],
)
def test_an_engine_equals_transformers(tmp_path, name, dtype, methods, extrope):
    model = build(name, tmp_path, getattr(torch, dtype))
    plain, want = expected(model, []), expected(model, methods)
    exact = copy.deepcopy(model).to(torch.float64 if dtype == "float32" else torch.float32)
    ref = expected(exact, methods)
    flags = {"limit_mm_per_prompt": NONE} if name == "Qwen3VL" else {"language_model_only": True}
    with engine(tmp_path, extrope, **flags, dtype=dtype) as llm:
        got = generated(llm)
    assert tokens_of(got) == tokens_of(want)
    error, theirs = rms(got, ref), rms(want, ref)
    print(f"{name} {extrope}: {error:.1e}, transformers {theirs:.1e}, plain {rms(got, plain):.1e}")
    assert error <= 2 * theirs < rms(got, plain)


def test_engines_that_see_are_refused_by_the_flags_to_set(tmp_path):
    build("Qwen3VL", tmp_path)
    entry, message = {"extrope": {"score": RERO}}, "extrope: .* text alone .* --language-model-only"
    for options in ({}, {"limit_mm_per_prompt": {"image": 0}}):
        with pytest.raises(ValueError, match=message):
            configured(tmp_path, entry, **options)
    with pytest.raises(ValueError, match=message):
        configured(tmp_path, entry, limit_mm_per_prompt=NONE, enable_mm_embeds=True)
    assert configured(tmp_path, entry, limit_mm_per_prompt=NONE).model_config.uses_mrope
