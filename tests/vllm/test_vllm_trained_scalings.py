"""Models that were trained under a scaling keep it below a method, in an engine as in `extend`."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import LENGTH, SIZES, build
from test_vllm_engines import GEMMA, RERO, TWO_KINDS, YARN, equals_transformers

ORIGINAL = {"original_max_position_embeddings": 32}
PAIRS = SIZES["head_dim"] // 2
LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    **ORIGINAL,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.01 * n for n in range(PAIRS)],
    "long_factor": [1.0 + 0.5 * n for n in range(PAIRS)],
    "factor": 4.0,
    **ORIGINAL,
}
MISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    **ORIGINAL,
}
MODELS = {
    "Gemma3": TWO_KINDS | GEMMA | {"rope_parameters": LINEAR},
    "Llama": {"rope_parameters": LLAMA3},
    "Phi3": {"rope_parameters": LONGROPE, "hidden_size": 128, **ORIGINAL},
    # Its amplitude is 1, and its queries grow with their position.
    "Ministral3": {"rope_parameters": MISTRAL, "sliding_window": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_method_scales_what_was_trained(tmp_path, name):
    equals_transformers(build(name, tmp_path, **MODELS[name]), tmp_path, [YARN])


def test_a_score_method_keeps_longrope_for_the_engines_length(tmp_path):
    model = build("Phi3", tmp_path, **MODELS["Phi3"])
    own = {"method": "longrope", "seq_len": LENGTH}
    own |= {name: LONGROPE[name] for name in ("short_factor", "long_factor", "factor", *ORIGINAL)}
    equals_transformers(model, tmp_path, [own, RERO], {"score": RERO})
