"""Configurations with the frequencies of a candidate, of models with a scaling of their own too."""

import inspect

import pytest
import torch
from tiny_model import CONFIG, TRAINED, save_tokenizer
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from extrope_kernels import methods
from extrope_kernels.cli import main
from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.search import stages
from extrope_kernels.evaluation.search.candidates import Candidate, frequency_methods
from extrope_kernels.evaluation.search.config import find_site, write_config

LENGTH = 100
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5] * 4,
    "original_max_position_embeddings": TRAINED,
}
SCALED = {"rope_parameters": LONGROPE, "max_position_embeddings": 4 * TRAINED}
CANDIDATES = (
    *frequency_methods(LENGTH, TRAINED),
    Candidate("cope", {"clip": 2}),
    Candidate("proportional", {"partial_rotary_factor": 0.75}),  # a pair does not rotate
)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def frequencies(candidate):
    """Those of a head of 8 dims."""
    method = methods.METHODS[candidate.method]
    own = {"dim": 8, "base": 1e4, "original_max_position_embeddings": TRAINED}
    own = {
        name: value for name, value in own.items() if name in inspect.signature(method).parameters
    }
    return method(**own | candidate.params)


@pytest.mark.parametrize(
    ("make", "config_class", "changed"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (LlamaForCausalLM, LlamaConfig, {"rope_parameters": DYNAMIC}),
        (LlamaForCausalLM, LlamaConfig, SCALED),
        (  # which refuses any type but longrope
            Phi3ForCausalLM,
            Phi3Config,
            SCALED | {"original_max_position_embeddings": TRAINED, "pad_token_id": None},
        ),
    ],
    ids=["plain", "dynamic", "longrope", "phi3"],
)
def test_written_configurations_rotate_as_the_candidates(make, config_class, changed, tmp_path):
    torch.manual_seed(0)
    model = make(config_class(**CONFIG | changed)).eval()
    ids = torch.randint(0, 100, (1, LENGTH))
    site, plain = find_site(model), logits(model, ids)
    write_config(model, site, Candidate(), LENGTH, tmp_path)
    written = make(AutoConfig.from_pretrained(tmp_path)).eval()
    written.load_state_dict(model.state_dict())
    assert torch.equal(logits(written, ids), plain)
    for candidate in CANDIDATES:
        write_config(model, site, candidate, LENGTH, tmp_path)
        config, wanted = AutoConfig.from_pretrained(tmp_path), frequencies(candidate)
        own = make(config).model.rotary_emb
        # Factors are rounded as they are written, multiplied and inverted: 3 roundings more.
        for found in (own.inv_freq, methods.from_hf_config(config).inv_freq):
            torch.testing.assert_close(found, wanted.inv_freq, rtol=2**-22, atol=1e-20)
        assert own.attention_scaling == pytest.approx(wanted.attention_factor), candidate.name


def test_written_configurations_give_the_logits_of_extend(folder, tmp_path):
    """Transformers' own angles are float32 products, wrong by 2^-24 of the angle, ours are not."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 100, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    plain = logits(model, ids)
    with Candidate("rope").extending(model):
        rounding = (logits(model, ids) - plain).abs().max()
    for candidate in CANDIDATES[1:4]:
        write_config(model, find_site(model), candidate, LENGTH, tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        got = logits(LlamaForCausalLM.from_pretrained(folder, config=config).eval(), ids)
        with candidate.extending(model):
            wanted = logits(model, ids)
        # As above.
        assert (got - wanted).abs().max() <= 4 * rounding + 1e-6, candidate.name
        assert (got - plain).abs().max() > 100 * rounding, candidate.name


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
    monkeypatch.setattr(stages, "frequency_methods", lambda *_: [CANDIDATES[0]])
    monkeypatch.setattr(stages, "_HELD_OUT_PIECES", 1)
    monkeypatch.setattr(stages, "_RATIOS", ())
    assert main([*command.split(), "--budget", "10", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.count("score methods are left out: extend: LlamaModel is not a supported") == 1
    assert (tmp_path / "found" / "extended" / "config.json").exists()


def test_a_model_without_rotary_embeddings_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="GPT2"):
        find_site(model)
