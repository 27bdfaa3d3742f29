"""Models that a search cannot extend by every method, and what it writes for other programs."""

import pytest
import torch
from tiny_model import CONFIG, TRAINED, save_tokenizer
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from extrope_cli import main
from extrope_kernels.evaluation.search import stages
from extrope_kernels.evaluation.search.candidates import Candidate, frequency_methods
from extrope_kernels.evaluation.search.run import write_config

LENGTH = 100
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5] * 4,
    "original_max_position_embeddings": TRAINED,
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("own", [None, DYNAMIC, LONGROPE], ids=["plain", "dynamic", "longrope"])
def test_written_configurations_give_the_logits_of_extend(own, tmp_path):
    """Transformers' own angles are float32 products, wrong by 2^-24 of the angle, ours are not."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, rope_parameters=own)).eval()
    model.config.quantization_config = {"quant_method": "gguf"}  # as from a GGUF file
    ids = torch.randint(0, 100, (1, LENGTH))
    plain = logits(model, ids)
    unscaled = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    unscaled.load_state_dict(model.state_dict())
    with Candidate("rope").extending(model):
        rounding = (logits(unscaled, ids) - logits(model, ids)).abs().max()
    published = frequency_methods(LENGTH, TRAINED)
    for candidate in (Candidate(), *published, Candidate()):
        write_config(model, candidate, LENGTH, tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        written = LlamaForCausalLM(config).eval()
        written.load_state_dict(model.state_dict())
        with candidate.extending(model):
            wanted = logits(model, ids)
        # Other frequencies are slower, but there are two of each: transformers' and ours. A
        # factor of LongRoPE is rounded itself, and its product with a wavelength.
        often = 4 if config.rope_parameters["rope_type"] == "longrope" else 2
        assert (logits(written, ids) - wanted).abs().max() <= often * rounding, candidate.name
        if candidate.method == "plain":
            assert not (tmp_path / "extrope.json").exists()
        else:
            assert (wanted - plain).abs().max() > 100 * rounding, candidate.name
            assert config.max_position_embeddings == LENGTH


def test_what_score_methods_cannot_extend_is_searched_for_frequencies(
    tmp_path, capsys, monkeypatch
):
    """Its own frequencies change with the length, and score methods keep them."""
    config = LlamaConfig(**CONFIG | {"rope_parameters": DYNAMIC})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    text = tmp_path / "story.txt"
    text.write_text("The quick brown fox, at 7 o'clock, jumps over 13 lazy dogs.\n" * 20)
    command = f"search --model {tmp_path} --text {text} --length 480 --out {tmp_path}/found"
    monkeypatch.setattr(
        stages, "frequency_methods", lambda *_: [Candidate("yarn", {"factor": 15.0})]
    )
    monkeypatch.setattr(stages, "_HELD_OUT_PIECES", 1)
    monkeypatch.setattr(stages, "_RATIOS", ())
    assert main([*command.split(), "--budget", "10", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.count("score methods are left out: extend: LlamaModel is not a supported") == 1
    assert (tmp_path / "found" / "extended" / "config.json").exists()


def test_a_model_without_rotary_embeddings_is_refused(folder, tmp_path, capsys):
    save_tokenizer(tmp_path)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    command = f"search --model {tmp_path} --text pydocs --length 480 --out {tmp_path}/found"
    assert main([*command.split(), "--device", "cpu"]) == 2
    assert "must have a rotary embedding" in capsys.readouterr().err.splitlines()[-1]
