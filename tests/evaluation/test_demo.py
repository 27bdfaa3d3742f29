"""`make demo` on a tiny model: what it says, what it leaves, and how it goes on."""

from __future__ import annotations

import subprocess
import sys

import demo
import pytest
from tiny_model import check_image

from extrope_kernels.evaluation import packages, runner
from extrope_kernels.evaluation import plots as evaluation_plots


@pytest.fixture
def tiny(folder, tmp_path, monkeypatch):
    """The demo in little, with the last picture alone."""
    monkeypatch.setattr(evaluation_plots, "available", lambda: False)
    monkeypatch.setattr(packages, "SMOLLM2", str(folder))
    monkeypatch.setattr("pydoc_data.topics.topics", {"assert": "Assert statements. " * 99})
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "LENGTH", 600)
    monkeypatch.setitem(demo.METHODS, "yarn", {"factor": 20.0})  # or generate warns: it was 32
    monkeypatch.setattr(demo, "ruler_of_all", lambda: "RULER.")
    return tmp_path


def test_the_plan_needs_nothing_installed():
    bare = [sys.executable, "-I", "-S", demo.__file__, "--plan"]
    told = subprocess.run(bare, capture_output=True, text=True, check=True).stdout
    for words in ("16,384", "build/demo/demo.png", "1.1 GB", "540 MB", "compiled", "Ctrl-C"):
        assert words in told


def test_it_shows_answers_and_curves_and_reads_nothing_twice(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 0
    told = capsys.readouterr()
    assert demo.NEEDLE in told.out and demo.QUESTION in told.out
    for name in ("unmodified", "yarn factor=20", "rerope window=4096"):
        assert f"\n   {name:<20} " in told.out
    assert "4 texts to read" in told.err and "3 texts to read" in told.err
    check_image(tiny / "demo.png")

    for task in (runner.LossTask, runner.RecallTask):
        monkeypatch.setattr(task, "read", None)
    monkeypatch.setattr(demo, "answer", None)
    assert demo.main() == 0
    assert "0 texts to read" in capsys.readouterr().err


def test_an_interrupt_is_told_in_its_own_name(tiny, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo, "show", interrupted)
    assert demo.main() == 130
    assert capsys.readouterr().err.startswith("\ndemo: interrupted; nothing was done yet")
    (tiny / "needle.json").touch()
    assert demo.main() == 130
    assert f"{tiny} keeps what was done" in capsys.readouterr().err


def test_the_needle_stands_once_far_before_the_question(tokenizer):
    ids, before = demo.hide(tokenizer)
    letters = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert ids.shape == (1, demo.LENGTH - demo.NEW) and ids.shape[1] - before > 8192
    assert "".join(letters[before:]).startswith(f"\n{demo.NEEDLE}\n")
    assert "".join(letters).count(demo.NEEDLE) == 1 and "".join(letters).endswith(demo.ANSWER)


def test_it_says_what_ruler_found():
    yarn = "yarn factor=2 39 of 50, rerope window=4096 50 of 50, yarn factor=4 45 of 50"
    assert f"unmodified 0 of 10, {yarn}" in demo.ruler_of_all()


def test_an_answer_without_words_is_told_as_one():
    assert demo.said("7481952. The") == "'7481952. The'"
    assert demo.said(": : : :") == "no words at all: ': : : :'"
