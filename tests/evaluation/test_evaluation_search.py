"""The search for what lets a model read a length, end to end on a tiny random model."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import CONFIG, TRAINED, check_image, results, retrained
from transformers import LlamaForCausalLM

from extrope_kernels import methods
from extrope_kernels.cli import main
from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.models import find_model, load_model
from extrope_kernels.evaluation.recall import Repeat, distances, gains
from extrope_kernels.evaluation.search import pieces, run, search, stages
from extrope_kernels.evaluation.search.candidates import Candidate, published
from extrope_kernels.evaluation.search.factors import NoGradient, find_ladder, write_config
from extrope_kernels.evaluation.search.stages import Ledger
from extrope_kernels.evaluation.texts import read_text

LENGTH, FAR = 480, 72  # of pieces, and where none are needed
YARN, PARTS = (Candidate(method, {"factor": 15.0}) for method in ("yarn", "ntk_by_parts"))


@pytest.fixture(scope="module")
def whole_story(tmp_path_factory):
    text = tmp_path_factory.mktemp("story") / "story.txt"
    text.write_text("".join(chr(33 + (n * n // 7) % 90) for n in range(1200)))
    return text


@pytest.fixture
def story(whole_story, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copy(whole_story, tmp_path))


@pytest.fixture
def call(folder, story, tmp_path, monkeypatch):
    """Runs the command with few candidates, steps and pieces; returns its exit code."""
    few(monkeypatch)

    def run_with(**given):
        defaults = {"model": folder, "text": story, "length": LENGTH, "device": "cpu"}
        options = defaults | {"out": tmp_path / "out", "budget": 10} | given
        pairs = [(name.replace("_", "-"), value) for name, value in options.items()]
        return main(["search", *(f"--{name}={value}" for name, value in pairs)])

    return run_with


def few(monkeypatch):
    monkeypatch.setattr(stages, "_HELD_OUT_PIECES", 2)
    monkeypatch.setattr(stages, "_RATIOS", (1.5,))
    monkeypatch.setattr(stages, "_STEPS", 1)
    monkeypatch.setattr(stages, "published", lambda *_: [YARN, PARTS])
    monkeypatch.setattr(stages, "score_methods", lambda *_: [Candidate("rerope", {"window": 8})])


@pytest.fixture(scope="module")
def finished(folder, whole_story, tmp_path_factory):
    """A folder with a whole search, what it returned and what it printed."""
    out, printed = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        few(patch)
        found = search(str(folder), str(whole_story), LENGTH, out, budget=10, device="cpu")
    return out, found, printed.getvalue()


@pytest.fixture
def model(folder):
    return load_model(find_model(str(folder)), "float32", "cpu").requires_grad_(False)


def test_finds_tells_and_writes(finished):
    folder, found, out = finished
    assert found == json.loads((folder / "search.json").read_text())
    names = {row["name"] for row in found["finalists"]}
    assert {"plain", YARN.name} < names
    assert any(name.startswith("rerope window=") for name in names)
    to_yarn = [row["to_yarn"] for row in found["finalists"]]
    assert to_yarn == sorted(to_yarn)
    held_out = [row for row in found["rows"] if row["of"]["kind"] == "held-out"]
    yarn = [row["loss"] for row in held_out if row["of"]["method"] == "yarn"]
    for row in found["finalists"]:
        own = [r for r in held_out if r["of"]["method"] == row["method"]]
        own = [r["loss"] for r in own if r["of"]["params"] == row["params"]]
        hopeless = own[0] > yarn[0] + stages._HOPELESS
        assert row["pieces"] == own and len(own) == 2 - hopeless
        assert row["loss"] == pytest.approx(sum(own) / len(own))
        behind = [a - b for a, b in zip(own, yarn, strict=False)]
        assert row["to_yarn"] == pytest.approx(sum(behind) / len(behind))
    assert found["texts"][0]["name"] == "story.txt, first half"
    assert found["held_out"][0]["name"] == "story.txt, second half"
    check_image(folder / "search.png")
    assert "the first half of each text is searched on, the second decides" in out
    assert f"held-out pieces: {found['finalists'][0]['name']}" in out
    assert (folder / "extended" / "config.json").is_file()


def test_factors_are_those_that_cost_less_at_the_full_length(finished):
    _, found, _ = finished
    costs = {}
    for row in found["rows"]:
        if row["of"]["kind"] == "search":
            costs.setdefault(json.dumps(row["of"]["params"]), []).append(row["loss"])
    (searched,) = (row for row in found["finalists"] if row["method"] == "longrope")
    began = min(sum(costs[json.dumps(each.params)][:2]) for each in (YARN, PARTS))
    assert sum(costs[json.dumps(searched["params"])]) < began
    assert searched["params"]["long_factor"] == sorted(searched["params"]["long_factor"])


def test_parameters_are_moved_until_no_move_costs_less(model, monkeypatch):
    """On a bowl in the logarithms of both."""

    def cost(self, candidate, index, share):
        found = candidate.params["window"] / 13, candidate.params["factor"] / 3
        return sum(math.log(each) ** 2 for each in found) + index

    monkeypatch.setattr(stages.Search, "_cost", cost)
    ladder = find_ladder(model, TRAINED)
    looking = stages.Search(model, ladder, [], [], LENGTH, "loss", 0, None, None)
    start = Candidate("leaky_rerope", {"window": 8, "factor": 8.0})
    found = looking.refined(start, 1.0)
    assert abs(math.log(found.params["window"] / 13)) < math.log(1.2)
    assert abs(math.log(found.params["factor"] / 3)) < math.log(1.2)
    assert "log_n" not in found.params


def test_far_frequencies_are_tilted_and_then_go_downhill(model, monkeypatch):
    """To the least of a bowl in the logarithms of the divisors, not farther than steps reach."""
    least = torch.tensor([9.0, 5.5, 3.2, 2.1], dtype=torch.float64).log()

    def off(candidate):
        given = candidate.params.get("divisors", [candidate.params.get("factor")] * 4)
        return torch.tensor(given, dtype=torch.float64).log() - least

    def cost(self, candidate, index, share):
        return off(candidate).square().sum().item()

    def gradients(self, of, at, share):
        return (2 * off(of.candidate(at))).expand(2, -1)

    monkeypatch.setattr(stages.Search, "_cost", cost)
    monkeypatch.setattr(stages.Search, "_gradients", gradients)
    ladder = find_ladder(model, TRAINED)
    looking = stages.Search(model, ladder, [], [], LENGTH, "loss", 0, None, None)
    found = looking.far_frequencies(Candidate("leaky_rerope", {"window": 8, "factor": 4.0}), 1.0)
    assert found.method == "far_frequencies" and found.params["window"] == 8
    assert off(found)[2:].abs().max() < 0.1  # slow pairs; fast ones may move by a thousandth
    assert off(found)[:2].abs().max() < 0.2  # to there they are tilted


def test_the_function_refuses_in_one_line(folder, story, tmp_path):
    with pytest.raises(UsageError, match="objective must be one of loss, recall, got speed"):
        search(str(folder), [str(story)], LENGTH, tmp_path, objective="speed")
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, got int8"):
        search(str(folder), [str(story)], LENGTH, tmp_path, dtype="int8")


def test_goes_on_where_it_was_interrupted(finished, call, tmp_path, monkeypatch, capsys):
    _, whole, _ = finished
    measure, calls = stages.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(stages, "measure", interrupted)
    assert call() == 130
    out = tmp_path / "out"
    assert f"search: interrupted; finished rows are in {out}" in capsys.readouterr().err
    assert len(results(tmp_path, "search")["rows"]) == 4
    assert call() == 0
    again = results(tmp_path, "search")
    assert [row["of"] for row in again["rows"]] == [row["of"] for row in whole["rows"]]
    assert again["finalists"] == whole["finalists"]
    count = len(calls)
    assert call() == 0 and len(calls) == count  # all is known
    assert call(seed=1) == 2
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


def test_no_time_left_is_told(call, tmp_path, capsys):
    assert call(budget=1e-9) == 0
    assert "no time was left for held-out text" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "extended" / "config.json").read_text())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 900}, "600 tokens, too short for a length of 900"),
        ({"length": 479}, "length must be >= 480, got 479"),
        ({"budget": 0}, "budget must be > 0, got 0"),
        ({"held_out": "/nowhere/text"}, "--held-out /nowhere/text: No such file or directory"),
        ({"text": "/nowhere/text"}, "--text /nowhere/text: No such file or directory"),
        ({"model": "/nowhere/model"}, "--model /nowhere/model: no such folder or .gguf file"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(call, monkeypatch, capsys, given, message):
    monkeypatch.setattr("extrope_kernels.evaluation.models.load_model", None)
    assert call(**given) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_search_of_another_model_of_this_name_is_no_part_of_it(
    call, folder, story, tmp_path, capsys
):
    assert call(budget=1e-9) == 0
    kept = results(tmp_path, "search")
    assert len(kept["model_digest"]) == 12
    assert call(model=retrained(folder, tmp_path)) == 2
    assert "search.json is of other settings (model_digest)" in capsys.readouterr().err
    story.write_text(story.read_text()[::-1])
    assert call() == 2
    assert "search.json is of other settings (texts, held_out)" in capsys.readouterr().err
    assert results(tmp_path, "search") == kept


def test_held_out_text_is_another(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    link, copy = tmp_path / "link.txt", tmp_path / "copy.txt"
    link.symlink_to(text)
    copy.write_text(text.read_text())
    for same in (text, "story.txt", "./story.txt", f"../{text.parent.name}/story.txt", link, copy):
        with pytest.raises(UsageError, match=f"--held-out {same}: is searched on, too"):
            run.split_texts(tokenizer, ["pydocs", str(text)], str(same), 8)
    other = tmp_path / "other.txt"
    other.write_text("another text, of its own")
    first, second = run.split_texts(tokenizer, [str(text)], str(other), 8)
    assert [part[0].name for part in (first, second)] == ["story.txt", "other.txt"]
    (whole,) = first
    (first,), (second,) = run.split_texts(tokenizer, [str(text)], None, 8)
    assert torch.equal(torch.cat([first.ids, second.ids]), whole.ids)


def test_what_counts_of_a_piece(tokenizer, story):
    piece = pieces.cut(read_text(tokenizer, str(story)), LENGTH, 1, 0)
    with pytest.raises(UsageError):
        distances(LENGTH - 1)  # so that LENGTH is the shortest
    assert len(piece.passages) == 15 and pieces.SHORTEST == LENGTH
    inside = set()
    for passage in piece.passages:
        first, again = (
            piece.ids[at : at + passage.tokens] for at in (passage.first, passage.again)
        )
        assert torch.equal(first, again)
        inside |= {*range(passage.again, passage.again + passage.tokens)}
    losses = torch.randn(LENGTH - 1, generator=torch.Generator().manual_seed(0)).double()
    again = torch.stack([losses[at - 1] for at in sorted(inside)]).mean()  # of 2 tokens all count
    torch.testing.assert_close(losses @ piece.weights("recall"), again)
    counts = piece.weights("loss").nonzero().flatten() + 1  # of tokens that are predicted
    assert counts.min() > 0.75 * LENGTH and not inside & set(counts.tolist())
    assert len(counts) > 0.75 * (LENGTH / 4 - len(inside))
    assert piece.weights("loss").sum() == pytest.approx(1)


def test_measured_are_the_losses_of_the_model(model, tokenizer, story):
    piece = pieces.cut(read_text(tokenizer, str(story)), LENGTH, 0, 0)
    found = pieces.measure(model, piece, lambda: None)
    with torch.no_grad():
        out = model(piece.ids[None]).logits[0].double()
    losses = torch.nn.functional.cross_entropy(out[:-1], piece.ids[1:], reduction="none")
    wanted = {
        "loss": losses @ piece.weights("loss"),
        "again": losses @ piece.weights("recall"),
        "whole": losses.mean(),
        "recall": torch.tensor(gains(losses, piece.passages)).double().mean(),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value.item(), abs=1e-4), name


@pytest.mark.parametrize(("objective", "far"), [("loss", False), ("recall", True)])
def test_gradient_is_that_of_finite_differences(model, monkeypatch, objective, far):
    """In float64 but for the frequencies, whose rounding, 2^-24, is over the step in the error."""
    monkeypatch.setattr("extrope_kernels.evaluation.forward._LOGITS_AT_ONCE", 7 * 101)
    as_they_are = lambda x: x if x.is_floating_point() else x.to(torch.float32)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "float", as_they_are)  # of the logits
    model.double()
    ids = torch.randint(0, 100, (40,), generator=torch.Generator().manual_seed(1))
    piece = pieces.Piece(ids, [Repeat(20, 10, 30, 6)])
    logs = torch.linspace(0.0, 0.9, 4, dtype=torch.float64)
    ladder = find_ladder(model, TRAINED)
    leaky = Candidate("leaky_rerope", {"window": 8, "factor": 2.0})
    of = ladder.divisors(leaky, 40) if far else ladder.factors(1.1, 40)

    def value(at):
        loss = lambda: pieces.weighted_loss(model, piece, objective, lambda: None)  # noqa: E731
        return of.gradient(model, at, loss)

    _, got = value(logs)
    step = 3e-4
    for pair in range(4):
        move = torch.zeros_like(logs)
        move[pair] = step
        slope = (value(logs + move)[0] - value(logs - move)[0]) / (2 * step)
        # Third differences, step^2 times the curvature's curvature, and 40 positions' rounding.
        assert got[pair].item() == pytest.approx(slope, rel=1e-3, abs=40 * 2**-24 / step)
    assert got.abs().max() > 1e-2
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_without_gradients_there_are_no_factors(model, monkeypatch):
    def none(*_):
        raise NoGradient

    monkeypatch.setattr(stages.Search, "_gradients", none)
    told = []
    display = SimpleNamespace(line=told.append)
    ladder = find_ladder(model, TRAINED)
    looking = stages.Search(model, ladder, [], [], LENGTH, "loss", 0, None, display)
    assert looking.factors(YARN, 1.0) is None
    assert told == ["no gradient reaches this model's frequencies: none are moved"]


def test_tables_that_record_no_gradient(monkeypatch):
    """A model that the op does not rotate, whose rotary embedding runs under no_grad."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(**CONFIG | {"num_hidden_layers": 1})
    model = NanoChatForCausalLM(config).eval().requires_grad_(False)
    rotary = type(model.model.rotary_emb)
    monkeypatch.setattr(rotary, "forward", torch.no_grad()(rotary.forward))
    piece = pieces.Piece(torch.arange(9), [])
    with pytest.raises(NoGradient):
        find_ladder(model, TRAINED).factors(1.0, 40).gradient(
            model,
            torch.zeros(4),
            lambda: pieces.weighted_loss(model, piece, "loss", lambda: None),
        )


def test_written_configurations_give_the_logits_of_extend(model, folder, tmp_path):
    """Transformers' own angles are float32 products, wrong by 2^-24 of the angle, ours are not."""
    model.set_attn_implementation("sdpa")  # as in plain transformers
    ladder = find_ladder(model, TRAINED)
    ids = torch.randint(0, 100, (1, FAR), generator=torch.Generator().manual_seed(0))
    searched = ladder.factors(1.05, FAR).candidate(torch.tensor([0.0, 0.1, 0.5, 1.2]))
    with torch.no_grad():
        plain = model(ids).logits
        with Candidate("rope").extending(model):
            rounding = (model(ids).logits - plain).abs().max()
    for candidate in (Candidate(), *published(FAR, TRAINED, 4), searched):
        write_config(model, ladder, candidate, FAR, tmp_path)
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


def test_a_loss_that_is_no_number_is_told(call, folder, tmp_path, capsys):
    broken = retrained(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(broken)
    assert call(model=broken) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"search: the loss under {YARN.name} is nan, which ranks with no other"
