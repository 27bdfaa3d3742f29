"""What plots, tables and progress bars show, and that a run goes on with its own results only."""

import io
import re
import sys

import pytest
import torch
from tiny_model import CONFIG, check_image, results, retrained
from transformers import LlamaConfig, LlamaForCausalLM

from extrope_kernels.evaluation import plots, report
from extrope_kernels.evaluation.digests import model_digest

ABOUT = {"model": "m", "texts": [{"name": "t"}], "dtype": "float32", "training_length": 8}
SETTINGS = {"loss": {"bucket": 4}, "recall": {"distances": [2, 14]}}


def lines_of(axes):
    """(x, y, standard error or None) of each point, by the label of its line."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        ends = [segment[:, 1] for segment in bars[0].get_segments()] if container.has_yerr else None
        errors = [None] * 2 if ends is None else [(high - low) / 2 for low, high in ends]
        found[container.get_label()] = [*zip(*(x.tolist() for x in line.get_data()), errors)]
    return found


@pytest.mark.parametrize("task", ["loss", "recall"])
def test_lines_are_the_numbers_with_their_errors(monkeypatch, task):
    def row(method, length, *points, params=None):
        buckets = [
            {"start": x - 2, "stop": x + 2, "loss": y, "error": error} for x, y, error in points
        ]
        gains = [{"distance": x, "gain": y, "error": error} for x, y, error in points]
        numbers = {"loss": {"buckets": buckets}, "recall": {"gains": gains}}
        return {"method": method, "length": length, "params": params or {}, **numbers[task]}

    both, alone, longer = (
        [(2, 3.0, 0.25), (14, 2.0, 0.5)],
        [(2, 1.0, None), (14, 4.0, None)],
        [(2, 5.0, 0.125), (14, 6.0, 0.25)],
    )
    rows = [row("a", 16, *both), row("b", 16, *alone), row("b", 32, *longer)]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.plot(ABOUT | SETTINGS[task] | {"rows": rows}, None)
    first, second = map(lines_of, figures[0].axes)
    assert first == {"a": both, "b": alone} and second == {"b": longer}
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    rows.append(row("b", 16, *longer, params={"window": 8}))
    plots.plot(ABOUT | SETTINGS[task] | {"rows": rows}, None)
    first, second = map(lines_of, figures[1].axes)
    assert first == {"a": both, "b": alone, "b window=8": longer} and second == {"b": longer}


def test_progress_without_a_terminal_leads_to_an_end_that_is_told(monkeypatch, capsys):
    monkeypatch.setattr(report, "_TELL_EVERY", 0.0)
    with report.Display(io.StringIO(), 4) as display:
        for _ in range(4):
            display.begin("part", 2)
            for _ in range(3):  # one more than was told: a model is tried before it is measured
                display.tick()
            display.line("")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"part: 12% of all, \d\d:\d\d so far", lines[1])
    assert re.fullmatch(r"part: 100% of all, \d\d:\d\d so far, about 00:00 left", lines[-1])
    told = [int(found) for found in re.findall(r"part: (\d+)% of all", "\n".join(lines))]
    assert told == sorted(told) and {12, 25, 38, 50, 62, 75, 88, 100} == set(told)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bars_on_a_terminal(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "90")
    assert run(methods="rope,pi", bucket=8) == 0
    wanted = r"\rreading text 1 of 1 by pi, 64 tokens: +\d+% of all \|"
    assert re.search(wanted, sys.stderr.getvalue())
    shown = capsys.readouterr().out
    for row in results(tmp_path)["rows"]:
        cells = " ".join(f"{b['loss']:10.3f}" for b in row["buckets"])
        assert f"{row['method']:<12}     64 {cells}" in shown


@pytest.mark.parametrize(
    "content", [b'{"task": "loss", "rows', b"", b"[]", b'{"rows": 1}', b"\xff"]
)
def test_damaged_results_are_told_and_kept(run, tmp_path, capsys, content):
    path = tmp_path / "out" / "loss.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert run() == 2
    told = capsys.readouterr()
    last = told.err.splitlines()[-1]
    assert told.out == "" and last.startswith(f"eval: {path} cannot be read (")
    assert last.endswith("); name another --out, or move it")
    assert path.read_bytes() == content


def test_digest_of_a_model():
    def made(seed=0, **changes):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**CONFIG | changes))

    digest = model_digest(made())
    assert model_digest(made()) == digest
    assert model_digest(made(seed=1)) != digest
    assert model_digest(made(rms_norm_eps=1e-5)) != digest
    assert model_digest(made(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) != digest
    assert model_digest(made().bfloat16()) != digest
    swapped = made()
    first, second = swapped.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp
    assert model_digest(swapped) != digest
    elsewhere = made(architectures=["LlamaForCausalLM"])
    elsewhere.config._name_or_path = "elsewhere"
    assert model_digest(elsewhere) == digest


@pytest.mark.parametrize(
    ("task", "length", "trials"), [("loss", 64, 1), ("loss", 64, 2), ("recall", 480, 1)]
)
def test_losses_that_are_no_numbers_are_shown_and_resumed(
    run, folder, tmp_path, capsys, task, length, trials
):
    broken = retrained(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(broken)
    text = tmp_path / "story.txt"
    text.write_text("".join(chr(33 + n % 90) for n in range(0, 8000, 7)))
    tables = []
    for _ in range(2):
        given = {"task": task, "text": text, "lengths": length, "trials": trials}
        assert run(plot=True, model=broken, bucket=64, **given) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert set(tables[0].splitlines()[1].split()[2:]) == {"nan"}
    (row,) = results(tmp_path, task)["rows"]
    assert row.get("loss") is None
    check_image(tmp_path / "out" / f"{task}.png")
