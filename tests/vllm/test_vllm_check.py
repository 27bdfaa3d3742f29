"""What the command `check` says of vLLM, by vLLM's own rotary layers."""

from __future__ import annotations

import json

import pytest

import extrope_cli as cli

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 20000.0,
}
ORIGINAL = {"original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 4.0}
FACTORS = {"short_factor": [1.0] * 32, "long_factor": [3.0] * 32, "factor": 4.0}
CHUNKS = {"chunk_size": 1024, "local_size": 256}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "as stated"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL}}, "as stated"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "as stated"),
        ({"rope_scaling": LLAMA3 | ORIGINAL}, "as stated"),
        ({"rope_scaling": {"type": "longrope", **FACTORS, **ORIGINAL}}, "as stated for long texts"),
        ({"model_type": "qwen2", "dual_chunk_attention_config": CHUNKS}, "fails: "),
    ],
    ids=["plain", "yarn", "linear", "llama3", "longrope", "dual_chunk"],
)
def test_what_vllm_applies(tmp_path, capsys, more, said):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | more))
    assert cli.main(["check", str(tmp_path), "--json"]) == 0
    (rotation,) = json.loads(capsys.readouterr().out)["rotations"]
    assert rotation["vllm"].startswith(said)
    assert rotation["transformers"] == "as stated"
