"""The search for what lets a model read a length, end to end on a tiny random model."""

import json

import pytest
import torch
from tiny_model import CONFIG, TRAINED, check_image, results, retrained
from transformers import LlamaForCausalLM

from extrope_kernels import methods
from extrope_kernels.cli import main
from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.models import find_model, load_model
from extrope_kernels.evaluation.search import cli, losses, stages
from extrope_kernels.evaluation.search.candidates import Candidate, published
from extrope_kernels.evaluation.search.factors import find_ladder, write_config
from extrope_kernels.evaluation.search.losses import NoGradient
from extrope_kernels.evaluation.search.stages import Ledger

LENGTH = 72


@pytest.fixture
def search(folder, tmp_path, monkeypatch):
    """Runs the command with few candidates, steps and pieces; returns its exit code."""
    import argparse

    text = tmp_path / "story.txt"
    text.write_text("".join(chr(33 + (n * n // 7) % 90) for n in range(400)))
    monkeypatch.setattr(losses, "_SHORT", 16)
    monkeypatch.setattr(stages, "_STEPS", 3)
    monkeypatch.setattr(stages, "_GRADIENTS", 2)
    monkeypatch.setattr(stages, "_PIECES", 3)
    monkeypatch.setattr(stages, "_HELD_OUT_PIECES", 2)
    few = [Candidate("yarn", {"factor": 2.25}), Candidate("ntk_by_parts", {"factor": 2.25})]
    monkeypatch.setattr(stages, "published", lambda *_: few)
    monkeypatch.setattr(stages, "score_methods", lambda *_: [Candidate("rerope", {"window": 8})])

    def call(**given):
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        defaults = {"model": folder, "text": text, "length": LENGTH, "device": "cpu"}
        options = defaults | {"out": tmp_path / "out", "budget": 10} | given
        pairs = [(name.replace("_", "-"), value) for name, value in options.items()]
        return cli.run(parser.parse_args(f"--{name}={value}" for name, value in pairs))

    return call


@pytest.fixture
def model(folder):
    return load_model(find_model(str(folder)), "float32", "cpu").requires_grad_(False)


def test_finds_tells_and_writes(search, tmp_path, capsys):
    assert search() == 0
    found = results(tmp_path, "search")
    names = {row["name"] for row in found["finalists"]}
    assert {"plain", "yarn factor=2.25"} < names
    assert any(name.startswith("longrope attention_factor=1") for name in names)
    assert any(name.startswith("rerope window=8") for name in names)
    means = [row["loss"] for row in found["finalists"]]
    assert means == sorted(means)
    held_out = [row for row in found["rows"] if row["of"]["kind"] == "held-out"]
    for row in found["finalists"]:
        own = [r for r in held_out if r["of"]["method"] == row["method"]]
        own = [r["loss"] for r in own if r["of"]["params"] == row["params"]]
        assert row["pieces"] == own and len(own) == 2
        assert row["loss"] == pytest.approx(sum(own) / 2)
        assert row["loss_error"] == pytest.approx(abs(own[0] - own[1]) / 2)
    assert found["texts"][0]["name"] == "story.txt, first half"
    assert found["held_out"][0]["name"] == "story.txt, second half"
    for factors in found["factors"].values():
        assert all(factor > 0 for factor in factors)
    searched = next(row for row in found["finalists"] if row["method"] == "longrope")
    factors = searched["params"]["long_factor"]
    assert factors == sorted(factors) and factors != found["factors"]["yarn factor=2.25"]
    tried = [row["of"] for row in found["rows"] if row["of"]["kind"] == "full"]
    tried = [of["params"]["long_factor"] for of in tried if of["method"] == "longrope"]
    half, whole, quarter = torch.tensor(list(dict.fromkeys(map(tuple, tried)))).log()
    torch.testing.assert_close(whole - half, 2 * (half - quarter))
    check_image(tmp_path / "out" / "search.png")
    out = capsys.readouterr().out
    assert "the first half of each text is searched on, the second decides" in out
    assert f"best on 2 held-out pieces: {found['finalists'][0]['name']}" in out
    assert (tmp_path / "out" / "extended" / "config.json").is_file()


def test_goes_on_where_it_was_interrupted(search, tmp_path, monkeypatch, capsys):
    assert search() == 0
    whole = results(tmp_path, "search")
    measure, calls = stages.last_loss, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(stages, "last_loss", interrupted)
    out = tmp_path / "again" / "out"
    assert search(out=out) == 130
    kept = [row["of"]["kind"] for row in results(tmp_path / "again", "search")["rows"]]
    assert len(kept) - kept.count("full") == 11
    assert search(out=out) == 0
    again = results(tmp_path / "again", "search")
    assert [row["of"] for row in again["rows"]] == [row["of"] for row in whole["rows"]]
    assert again["finalists"] == whole["finalists"]
    count = len(calls)
    assert search(out=out) == 0 and len(calls) == count  # all is known
    assert search(out=out, seed=1) == 2
    assert "search.json is of other settings (seed)" in capsys.readouterr().err


def test_budget_is_kept(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 5))  # every measurement takes 5 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    ledger = Ledger(tmp_path / "search.json", {"rows": []}, 20.0)

    def measured(index, share):
        return ledger.measured({"kind": "short", "piece": index}, share, lambda: {"loss": 1.0})

    assert [measured(index, 0.5) is not None for index in range(3)] == [True, True, False]
    assert measured(0, 0.0)["seconds"] == 5  # known: costs nothing
    assert [measured(index, 1.0) is not None for index in range(2, 6)] == [True, True, False, False]
    assert ledger.spent == 20


def test_no_time_left_is_told(search, tmp_path, capsys):
    assert search(budget=1e-9) == 0
    assert "no time was left for held-out text" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "extended" / "config.json").read_text())
    assert search(budget=10) == 0
    assert "best on 2 held-out pieces" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 300}, "200 tokens, too short for --length 300"),
        ({"length": 8}, "--length must be >= 9, got 8"),
        ({"budget": 0}, "--budget must be > 0, got 0"),
        ({"held_out": "/nowhere/text"}, "--held-out /nowhere/text: No such file or directory"),
        ({"text": "/nowhere/text"}, "--text /nowhere/text: No such file or directory"),
        ({"model": "/nowhere/model"}, "--model /nowhere/model: no such folder or .gguf file"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(search, monkeypatch, capsys, given, message):
    monkeypatch.setattr("extrope_kernels.evaluation.models.load_model", None)
    assert search(**given) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_search_of_another_model_of_this_name_is_no_part_of_it(search, folder, tmp_path, capsys):
    assert search() == 0
    kept = results(tmp_path, "search")
    assert len(kept["model_digest"]) == 12
    assert search(model=retrained(folder, tmp_path)) == 2
    assert "search.json is of other settings (model_digest)" in capsys.readouterr().err
    story = tmp_path / "story.txt"
    story.write_text(story.read_text()[::-1])
    assert search() == 2
    assert "search.json is of other settings (texts, held_out)" in capsys.readouterr().err
    assert results(tmp_path, "search") == kept


def test_held_out_text_is_another(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    link, copy = tmp_path / "link.txt", tmp_path / "copy.txt"
    link.symlink_to(text)
    copy.write_text(text.read_text())
    for same in (text, "story.txt", "./story.txt", f"../{text.parent.name}/story.txt", link, copy):
        with pytest.raises(UsageError, match=f"--held-out {same}: is searched on, too"):
            cli.split_texts(tokenizer, ["pydocs", str(text)], str(same), 8)
    other = tmp_path / "other.txt"
    other.write_text("another text, of its own")
    first, second = cli.split_texts(tokenizer, [str(text)], str(other), 8)
    assert [part[0].name for part in (first, second)] == ["story.txt", "other.txt"]
    (whole,) = first
    (first,), (second,) = cli.split_texts(tokenizer, [str(text)], None, 8)
    assert torch.equal(torch.cat([first.ids, second.ids]), whole.ids)


def test_short_pieces_reach_far(tokenizer, text, monkeypatch):
    monkeypatch.setattr(losses, "_SHORT", 16)
    (whole,), _ = cli.split_texts(tokenizer, [str(text)], None, 8)
    gaps = []
    for index in range(20):
        ids, at = losses.short_piece(whole, LENGTH, index, 0)
        steps = at.diff()
        assert len(ids) == 16 and (steps == 1).sum() >= 14 and at.max() < LENGTH
        assert (steps[8:] == 1).all()  # the gap is in the first half
        gaps.append(int(steps.max()))
    assert LENGTH * 3 // 8 < min(gaps) < LENGTH // 2 and max(gaps) > LENGTH * 2 // 3


def test_a_gap_of_positions_is_no_end_of_a_sequence(model):
    """All tokens are seen across it, as by a causal mask that is given."""
    ids, at = torch.randint(0, 100, (12,)), torch.tensor([*range(5), *range(40, 47)])
    with torch.no_grad():
        got = losses.last_loss(model, ids, at, share=0.5)
        mask = torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        out = model(ids[None], position_ids=at[None], attention_mask=mask).logits[0]
    wanted = torch.nn.functional.cross_entropy(out[6:-1], ids[7:])
    torch.testing.assert_close(got, wanted)


def test_gradient_is_that_of_finite_differences(model, monkeypatch):
    """In float64 but for the frequencies, whose rounding, 2^-24, is over the step in the error."""
    monkeypatch.setattr("extrope_kernels.evaluation.forward._LOGITS_AT_ONCE", 7 * 101)
    as_they_are = lambda x: x if x.is_floating_point() else x.to(torch.float32)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "float", as_they_are)  # of the logits
    model.double()
    ids = torch.randint(0, 100, (40,), generator=torch.Generator().manual_seed(1))
    logs = torch.linspace(0.0, 0.9, 4, dtype=torch.float64)
    params = {"attention_factor": 1.1, "seq_len": TRAINED}

    def value(at):
        return losses.gradient(model, at, params, lambda: losses.last_loss(model, ids, share=0.5))

    _, got = value(logs)
    step = 1e-3
    for pair in range(4):
        move = torch.zeros_like(logs)
        move[pair] = step
        slope = (value(logs + move)[0] - value(logs - move)[0]) / (2 * step)
        # Third differences, step^2 times the curvature's curvature, and 40 positions' rounding.
        assert got[pair].item() == pytest.approx(slope, rel=1e-3, abs=40 * 2**-24 / step)
    assert got.abs().max() > 1e-2
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_without_gradients_there_are_no_factors(search, tmp_path, monkeypatch, capsys):
    def none(*_):
        raise NoGradient

    monkeypatch.setattr(stages, "gradient", none)
    assert search() == 0
    assert "no gradient reaches this model's frequencies" in capsys.readouterr().out
    methods = {row["method"] for row in results(tmp_path, "search")["finalists"]}
    assert {"plain", "yarn", "rerope"} <= methods and "longrope" not in methods


def test_tables_that_record_no_gradient(monkeypatch):
    """A model that the op does not rotate, whose rotary embedding runs under no_grad."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(**CONFIG | {"num_hidden_layers": 1})
    model = NanoChatForCausalLM(config).eval().requires_grad_(False)
    rotary = type(model.model.rotary_emb)
    monkeypatch.setattr(rotary, "forward", torch.no_grad()(rotary.forward))
    params = {"attention_factor": 1.0, "seq_len": TRAINED}
    with pytest.raises(NoGradient):
        losses.gradient(
            model,
            torch.zeros(4),
            params,
            lambda: losses.last_loss(model, torch.arange(9), share=0.5),
        )


def test_written_configurations_give_the_logits_of_extend(model, folder, tmp_path):
    """Transformers' own angles are float32 products, wrong by 2^-24 of the angle, ours are not."""
    model.set_attn_implementation("sdpa")  # as in plain transformers
    ladder = find_ladder(model, TRAINED)
    ids = torch.randint(0, 100, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    searched = ladder.longrope(torch.tensor([0.0, 0.1, 0.5, 1.2]), 1.05)
    with torch.no_grad():
        plain = model(ids).logits
        with Candidate("rope").extending(model):
            rounding = (model(ids).logits - plain).abs().max()
    for candidate in (Candidate(), *published(LENGTH, TRAINED, 4), searched):
        write_config(model, ladder, candidate, LENGTH, tmp_path)
        config = LlamaForCausalLM.config_class.from_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(folder, config=config).eval()
        with torch.no_grad(), candidate.extending(model):
            got, wanted = loaded(ids).logits, model(ids).logits
        # Factors are rounded as they are written, multiplied and inverted: 3 roundings more.
        assert (got - wanted).abs().max() <= 4 * rounding + 1e-6, candidate.name
        if candidate.method not in ("plain", "cope", "proportional", "giraffe_truncation"):
            assert (got - plain).abs().max() > 100 * rounding, candidate.name
        own = loaded.model.rotary_emb
        inv_freq = ladder.freqs(candidate).inv_freq
        torch.testing.assert_close(own.inv_freq, inv_freq, rtol=2**-22, atol=1e-20)
        short = methods.from_hf_config(config)
        torch.testing.assert_close(short.inv_freq, inv_freq, rtol=2**-22, atol=1e-20)
        assert own.attention_scaling == pytest.approx(ladder.freqs(candidate).attention_factor)


def test_a_loss_that_is_no_number_is_told(folder, text, tmp_path, capsys):
    broken = retrained(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(broken)
    command = f"search --model {broken} --text {text} --length 64 --device cpu --out {tmp_path}"
    assert main(command.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "search: the loss under yarn factor=2 is nan, which ranks with no other"
