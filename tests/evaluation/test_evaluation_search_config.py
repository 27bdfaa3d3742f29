"""The search of a model that comes with a scaling of its own, and the configuration it writes."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tiny_model import CONFIG, save_tokenizer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from extrope_kernels.cli import main
from extrope_kernels.evaluation.search.candidates import Candidate, published
from extrope_kernels.evaluation.search.config import write_config
from extrope_kernels.evaluation.search.factors import find_ladder

TRAINED, LENGTH = 32, 100
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


@pytest.mark.parametrize(
    ("make", "config_class", "changed"),
    [
        (LlamaForCausalLM, LlamaConfig, {"rope_parameters": DYNAMIC}),
        (
            LlamaForCausalLM,
            LlamaConfig,
            {"rope_parameters": LONGROPE, "max_position_embeddings": 4 * TRAINED},
        ),
        (  # which refuses any type but longrope
            Phi3ForCausalLM,
            Phi3Config,
            {
                "rope_parameters": LONGROPE,
                "max_position_embeddings": 4 * TRAINED,
                "original_max_position_embeddings": TRAINED,
                "pad_token_id": None,
            },
        ),
    ],
    ids=["dynamic", "longrope", "phi3"],
)
def test_it_gives_what_the_candidate_gave(make, config_class, changed, tmp_path):
    torch.manual_seed(0)
    model = make(config_class(**CONFIG | changed)).eval()
    ids = torch.randint(0, 100, (1, LENGTH))
    ladder = find_ladder(model, model.config.max_position_embeddings)
    assert ladder.trained == TRAINED
    weights, plain = model.state_dict(), logits(model, ids)
    with Candidate("rope").extending(model):
        assert (logits(model, ids) - plain).abs().max() > 0.1  # its scaling matters
    for candidate in (Candidate(), *published(LENGTH, TRAINED, 4)):
        write_config(model, ladder, candidate, LENGTH, tmp_path)
        written = make(AutoConfig.from_pretrained(tmp_path)).eval()
        if candidate.method == "plain":
            written.load_state_dict(weights)
            assert torch.equal(logits(written, ids), plain)
            continue
        own, wanted = written.model.rotary_emb, ladder.freqs(candidate)
        # Factors are rounded as they are written, multiplied and inverted: 3 roundings more.
        torch.testing.assert_close(own.inv_freq, wanted.inv_freq, rtol=2**-22, atol=1e-20)
        assert own.attention_scaling == pytest.approx(wanted.attention_factor), candidate.name


def test_what_score_methods_cannot_extend_is_searched_for_frequencies(text, tmp_path, capsys):
    """Its own frequencies change with the length, and score methods keep them."""
    config = LlamaConfig(**CONFIG | {"rope_parameters": DYNAMIC})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    command = f"search --model {tmp_path} --text {text} --length {LENGTH} --out {tmp_path}/found"
    assert main([*command.split(), "--budget", "0.01", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.count("score methods are left out: extend: LlamaModel is not a supported") == 1
    assert (tmp_path / "found" / "extended" / "config.json").exists()


def test_score_methods_begin_where_the_own_scaling_ends():
    scaled = {"rope_parameters": LONGROPE, "max_position_embeddings": 4 * TRAINED}
    ladder = find_ladder(LlamaForCausalLM(LlamaConfig(**CONFIG | scaled)), 4 * TRAINED)
    assert (ladder.trained, ladder.scaled) == (TRAINED, 4 * TRAINED)
