"""A model whose configuration scales its frequencies already."""

import pytest

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tiny_model import CONFIG, results, save_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

TRAINED, SCALED, LENGTH = 32, 64, 128
OWN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": SCALED / TRAINED,
    "original_max_position_embeddings": TRAINED,
}


def test_methods_that_replace_the_scaling_extend_what_was_before(run, tmp_path):
    model = tmp_path / "model"
    config = Qwen2Config(**CONFIG | {"max_position_embeddings": SCALED, "rope_parameters": OWN})
    Qwen2ForCausalLM(config).save_pretrained(model)
    save_tokenizer(model)
    methods = "yarn,pi,dynamic_ntk,rerope"
    assert run(model=model, lengths=LENGTH, methods=methods, out=tmp_path / "out") == 0
    rows = results(tmp_path)["rows"]
    assert [row["params"] for row in rows] == [
        {"factor": LENGTH / TRAINED},
        {"factor": LENGTH / TRAINED},
        {"factor": LENGTH / SCALED},  # of max_position_embeddings, from which it counts
        {"window": SCALED // 2},  # on the model's own frequencies, trained to there
    ]
