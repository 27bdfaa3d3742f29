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
from tiny_model import check_image, results, retrained
from transformers import LlamaForCausalLM

from extrope_cli import main
from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.models import find_model, load_model
from extrope_kernels.evaluation.recall import distances, gains
from extrope_kernels.evaluation.report import Rows
from extrope_kernels.evaluation.search import pieces, run, search, stages
from extrope_kernels.evaluation.search.candidates import (
    Candidate,
    frequency_methods,
    score_methods,
)
from extrope_kernels.evaluation.texts import read_text

LENGTH = 480
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
    """Runs the command with few candidates, moves and pieces; returns its exit code."""
    few(monkeypatch)
    monkeypatch.setattr(run.plots, "available", lambda: False)  # they take most of the time

    def run_with(**given):
        defaults = {"model": folder, "text": story, "length": LENGTH, "device": "cpu"}
        options = defaults | {"out": tmp_path / "out", "budget": 10} | given
        pairs = [(name.replace("_", "-"), value) for name, value in options.items()]
        return main(["search", *(f"--{name}={value}" for name, value in pairs)])

    return run_with


def few(monkeypatch):
    monkeypatch.setattr(stages, "_HELD_OUT_PIECES", 2)
    monkeypatch.setattr(stages, "_RATIOS", (1.5,))
    monkeypatch.setattr(stages, "_TILTS", (2.0,))
    monkeypatch.setattr(stages, "frequency_methods", lambda *_: [YARN, PARTS])
    leaky = Candidate("leaky_rerope", {"window": 8, "factor": 4.0})
    monkeypatch.setattr(stages, "score_methods", lambda *_: [leaky])


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
    assert any(name.startswith("leaky_rerope window=") for name in names)
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


@pytest.fixture
def looking():
    """A search of four pairs of dims, without a model and texts."""
    return stages.Search(None, 4, {}, None, 20.0, None)


def test_parameters_are_moved_until_no_move_costs_less(looking, monkeypatch):
    """On a bowl in the logarithms of both."""

    def cost(self, candidate, index):
        found = candidate.params["window"] / 13, candidate.params["factor"] / 3
        return sum(math.log(each) ** 2 for each in found) + index + ("log_n" in candidate.params)

    monkeypatch.setattr(stages.Search, "_cost", cost)
    monkeypatch.setattr(stages, "training_length", lambda model: 32)
    found = looking.refined(Candidate("leaky_rerope", {"window": 8, "factor": 8.0}))
    assert abs(math.log(found.params["window"] / 13)) < math.log(1.2)
    assert abs(math.log(found.params["factor"] / 3)) < math.log(1.2)
    assert "log_n" not in found.params


def test_far_frequencies_are_tilted(looking, monkeypatch):
    """To where the fastest pair's divisor is four times the slowest one's."""

    def cost(self, candidate, index):
        fast, *_, slow = candidate.params.get("divisors", [4.0, 4.0])
        return abs(fast / slow - wanted)

    monkeypatch.setattr(stages.Search, "_cost", cost)
    start, wanted = Candidate("leaky_rerope", {"window": 8, "factor": 4.0}), 4.0
    found = looking.far_frequencies([start])
    assert found.method == "far_frequencies" and found.params["window"] == 8
    divisors = [8.0, 4 * 2 ** (1 / 3), 4 * 2 ** (-1 / 3), 2.0]
    assert found.params["divisors"] == pytest.approx(divisors, abs=5e-4)  # as rounded
    wanted = 1.0
    assert looking.far_frequencies([start]) is None


@pytest.mark.parametrize(
    ("method", "start", "name", "wanted"),
    [
        ("leaky_rerope", {"window": 2048, "factor": 4.0}, "window", [3072, 1365]),
        ("leaky_rerope", {"window": 2048, "factor": 4.0}, "factor", [6.0, 4.0 / 1.5]),
        ("self_extend", {"window": 40, "factor": 4}, "factor", [6, 2]),
        ("rerope", {"window": 8, "log_n": 32}, "window", [12, 5]),
    ],
)
def test_a_move_changes_one_number(method, start, name, wanted):
    """And SelfExtend's window with it, to be a multiple of its groups."""
    moves = Candidate(method, start).moves(1.5)
    moves = [each for each in moves if each.params[name] != start[name]]
    assert [each.params[name] for each in moves] == pytest.approx(wanted)
    for each in moves:
        rest = {key: value for key, value in each.params.items() if key not in (name, "window")}
        assert all(start[key] == value for key, value in rest.items())
        if method == "self_extend":
            assert each.params["window"] == 40 - 40 % each.params["factor"]


def test_candidates_fit_the_length():
    for length, factor in ((1000, 1000 / 96), (50, 1.0)):
        assert frequency_methods(length, 96)[0] == Candidate("yarn", {"factor": factor})
    # Groups that fill three quarters of the distances beyond half the training, none smaller.
    extended = next(x for x in score_methods(1000, 192) if x.method == "self_extend")
    window, factor = extended.params["window"], extended.params["factor"]
    assert (1000 - 96) / factor <= 0.75 * 96 < (1000 - 96) / (factor - 1)
    assert 96 - factor < window <= 96 and window % factor == 0


def test_the_function_refuses_in_one_line(folder, story, tmp_path):
    with pytest.raises(UsageError, match="--objective must be one of loss, recall, got 'speed'"):
        search(str(folder), [str(story)], LENGTH, tmp_path, objective="speed")
    with pytest.raises(UsageError, match="--dtype must be one of float32, bfloat16, got 'int8'"):
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


def test_budget_is_kept(looking, monkeypatch):
    """Three fifths of it to search, the rest for held-out text."""
    clock = iter(range(0, 1000, 4))  # every measurement takes 4 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(stages.Search, "_measured", lambda *_: {"loss": 1.0})
    looking.rows = Rows(None, {"objective": "loss"}, ["of"])
    looking.display = SimpleNamespace(line=print)
    for kind, most in (("search", 3), ("held-out", 2)):
        rows = [looking._read(Candidate(), index, kind) for index in range(4)]
        assert [row is not None for row in rows] == [index < most for index in range(4)]
        assert looking._read(Candidate(), 0, kind) == rows[0]  # known: costs nothing
    assert looking.spent == 20


def test_no_time_left_is_told(call, tmp_path, capsys):
    assert call(budget=1e-9) == 0
    assert "no time was left for held-out text" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "extended" / "config.json").read_text())


def test_without_held_out_text_the_best_of_the_searched_is_written(tmp_path, monkeypatch):
    rows = Rows(None, {"length": LENGTH}, ["of"])
    ended = {"rows": rows, "counts": "loss", "spent": 0.0, "model": None}
    looking = SimpleNamespace(on_held_out=lambda _: [], **ended)
    written = []
    monkeypatch.setattr(run, "write_config", lambda model, best, *_: written.append(best))
    monkeypatch.setattr(run.plots, "available", lambda: False)
    moved = Candidate("ntk_by_parts", {"factor": 10.0})
    for frequencies in ([YARN, moved, PARTS], [YARN, PARTS], [YARN]):
        run._conclude(looking, [*frequencies, Candidate()], tmp_path)
    assert written == [moved, PARTS, YARN]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 580}, "story.txt, first half: 600 tokens, too short for 610"),
        ({"length": 479}, "--length must be >= 480, got 479"),
        ({"budget": 0}, "--budget must be > 0, got 0"),
        ({"held_out": "/nowhere/text"}, "--held-out /nowhere/text: No such file or directory"),
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


def test_held_out_text_is_another(tokenizer, text, tmp_path):
    link, copy = tmp_path / "link.txt", tmp_path / "copy.txt"
    link.symlink_to(text)
    copy.write_text(text.read_text())
    other = tmp_path / "other.txt"
    other.write_text("another text, of its own")
    for same in (text, link, copy):
        with pytest.raises(UsageError, match=f"--held-out {same}: is searched on, too"):
            run.split_texts(tokenizer, [str(other), str(text)], str(same), 8)
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
    found = pieces.measure(model, piece)
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


def test_a_loss_that_is_no_number_is_told(call, folder, tmp_path, capsys):
    broken = retrained(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(broken)
    assert call(model=broken) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last
        == "search: the loss under leaky_rerope window=8 factor=4 is nan, which ranks with no other"
    )
