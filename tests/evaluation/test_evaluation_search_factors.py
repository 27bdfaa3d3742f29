"""Factors that rise and what moves them; models with a scaling of their own, as configurations."""

import math

import pytest
import torch
from tiny_model import CONFIG, save_tokenizer
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from extrope_kernels.cli import main
from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.search import stages
from extrope_kernels.evaluation.search.candidates import Candidate, published
from extrope_kernels.evaluation.search.factors import (
    PerPair,
    find_ladder,
    rising,
    write_config,
)

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
    monkeypatch.setattr(stages, "published", lambda *_: [])
    monkeypatch.setattr(stages, "_HELD_OUT_PIECES", 1)
    monkeypatch.setattr(stages, "_STEPS", 0)
    monkeypatch.setattr(stages, "_RATIOS", ())
    assert main([*command.split(), "--budget", "10", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.count("score methods are left out: extend: LlamaModel is not a supported") == 1
    assert (tmp_path / "found" / "extended" / "config.json").exists()


def test_score_methods_begin_where_the_own_scaling_ends():
    scaled = {"rope_parameters": LONGROPE, "max_position_embeddings": 4 * TRAINED}
    ladder = find_ladder(LlamaForCausalLM(LlamaConfig(**CONFIG | scaled)), 4 * TRAINED)
    assert (ladder.trained, ladder.scaled) == (TRAINED, 4 * TRAINED)


@pytest.mark.parametrize("length", [TRAINED // 2, TRAINED * 3 // 2, LENGTH])
def test_an_amplitude_other_than_the_usual_is_told_to_vllm(length, tmp_path):
    """Which takes the usual one, of its own length over the trained, where it is told none."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    ladder = find_ladder(model, TRAINED)
    factor = max(1, length / TRAINED)
    usual = math.sqrt(1 + math.log(factor) / math.log(TRAINED))
    for amplitude in (usual, 1.01 * usual):
        candidate = ladder.factors(amplitude, length).candidate(torch.zeros(4))
        write_config(model, ladder, candidate, length, tmp_path)
        found = AutoConfig.from_pretrained(tmp_path).rope_parameters
        assert found["factor"] == factor and found["attention_factor"] == amplitude
        told = None if amplitude == usual else amplitude
        assert found.get("short_mscale") == found.get("long_mscale") == told


def test_a_model_without_rotary_embeddings_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="GPT2"):
        find_ladder(model, 8)


def test_rising_is_isotonic_regression():
    """By its closed form: the largest over starts of the smallest over ends of means."""
    drawn = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 16):
        values = torch.randn(count, generator=drawn, dtype=torch.float64)
        wanted = [
            max(
                min(values[start : end + 1].mean().item() for end in range(i, count))
                for start in range(i + 1)
            )
            for i in range(count)
        ]
        torch.testing.assert_close(rising(values), torch.tensor(wanted, dtype=torch.float64))


def test_descent_finds_the_least_of_a_bowl_that_is_steep_in_one_pair():
    """As of angles: the curvature of a pair's loss is that of a cosine at the farthest distance."""
    angles = torch.tensor([30.0, 1.0], dtype=torch.float64)
    least = torch.tensor([0.02, 0.4], dtype=torch.float64)
    drawn = torch.Generator().manual_seed(0)
    at, size = torch.zeros(2, dtype=torch.float64), 1.0
    of = PerPair("longrope", (), {}, angles, rises=True)

    def loss(at):
        return ((at - least) * angles).square().sum().item()

    for _ in range(60):
        noise = torch.randn(4, 2, generator=drawn, dtype=torch.float64) * angles / 10
        tried = of.downhill(at, angles**2 * (at - least) + noise, size)
        assert (tried.diff() >= 0).all()
        at, size = (tried, size) if loss(tried) < loss(at) else (at, size / 4)
    assert ((at - least).abs() * angles < 0.1).all()


def test_a_step_is_short():
    start, downwards = torch.zeros(3, dtype=torch.float64), -torch.ones(4, 3).double()
    largest = torch.tensor([0.001, 0.05, 0.1], dtype=torch.float64)
    of = PerPair("far_frequencies", (), {}, torch.tensor([1000.0, 20.0, 1.0]))
    for size in (1.0, 0.25):
        torch.testing.assert_close(of.downhill(start, downwards, size), size * largest)


@pytest.mark.parametrize(
    ("method", "start", "move", "wanted"),
    [
        ("leaky_rerope", {"window": 2048, "factor": 4.0}, ("window", 1.5), {"window": 3072}),
        ("leaky_rerope", {"window": 2048, "factor": 4.0}, ("factor", 0.5), {"factor": 2.0}),
        ("self_extend", {"window": 40, "factor": 4}, ("factor", 1.2), {"factor": 5}),
        ("self_extend", {"window": 40, "factor": 4}, ("factor", 0.9), {"factor": 3, "window": 39}),
    ],
)
def test_a_move_changes_one_number(method, start, move, wanted):
    """And SelfExtend's window with it, to be a multiple of its groups."""
    candidate = Candidate(method, start)
    assert candidate.numbers == ["window", "factor"]
    assert candidate.moved(*move) == Candidate(method, start | wanted)
    assert Candidate(method, {"window": 8, "log_n": 32}).numbers == ["window"]
