"""The steps of `make gpu`, as far as they can be told without a GPU."""

from __future__ import annotations

import json
import runpy
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gpu import results, steps, suite, timing
from gpu.results import Deadline, Verdict

ROOT = Path(__file__).parents[2]
RUN = ROOT / "bench" / "gpu" / "run.py"
CARD = "NVIDIA H200"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where results go."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path / "gpu-h200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_nothing_runs_and_that_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RUN), "smoke"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(steps, "CARD", "print('')")  # what torch says here, without importing it
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(str(RUN), run_name="__main__")
    assert capsys.readouterr().out == "gpu: no CUDA device, nothing was run\n"


def test_an_unknown_step_is_told_the_known_ones(capsys):
    assert steps.main(["smoek"]) == 2
    assert "STEP must be one of ['build', 'smoke'," in capsys.readouterr().err
    assert steps.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(steps.STEPS)
    assert {name for name in steps.STEPS if name.startswith("bench ")} == {
        f"bench {name}" for name in timing.TIMED
    }


def test_a_step_that_dies_or_hangs_has_a_verdict(monkeypatch, tmp_path, folder):
    """And the results that it kept itself; those of an earlier run it has not."""
    program = tmp_path / "run.py"
    monkeypatch.setattr(steps, "RUN", program)
    results.save("smoke", Verdict(False, "of an earlier run"), {"card": CARD, "when": 1.0}, folder)
    for source, ok, line in (
        ("print('smoke: all right\\n[a warning as it ends]')", True, "all right"),
        ("print('smoke: some wrong'); raise SystemExit(1)", False, "some wrong"),
        ("print('at kernel 3'); import os; os.abort()", False, "ended with status -6 after"),
        ("print('at 4', flush=True); import time; time.sleep(60)", False, "with status -9 after"),
    ):
        program.write_text(source)
        monkeypatch.setattr(steps, "KILLED", 2.0 if "sleep" in source else 60.0)
        verdict = steps.run_apart("smoke", CARD)
        assert verdict.ok == ok and line in verdict.line
    assert verdict.line.endswith("at: at 4")
    kept = json.loads(results.path_of("smoke", folder).read_text())
    assert kept["verdict"] == verdict.line and not kept["ok"]
    about = {"card": CARD, "torch": "2.15", "when": time.time() + 60}
    results.save("smoke", Verdict(False, "1 of 2", {"rows": [1.5]}), about, folder)
    program.write_text("import os; os.abort()")
    assert steps.run_apart("smoke", CARD).line.endswith("; before: 1 of 2")
    kept = json.loads(results.path_of("smoke", folder).read_text())
    assert (kept["rows"], kept["torch"]) == ([1.5], "2.15")


def test_results_are_filed_under_the_card_and_make_one_table(folder):
    about = {"card": CARD, "torch": "2.15", "triton": "3.9", "commit": "abc+"}
    results.save("suite rope", Verdict(False, "3 of 4 ran"), {**about, "when": 2}, folder)
    (folder / "rope.json").write_text('{"machine": {}, "rows": []}')  # of `make bench`
    timed = Verdict(True, "all measured", {"table": "| a |"})
    results.save("bench rope", timed, {**about, "when": 1}, folder)
    text = (folder / "README.md").read_text()
    assert results.folder(CARD) == folder
    assert text.index("| bench rope | yes | all") < text.index("| suite rope | **no** | 3 of")
    assert "commit abc+" in text and "## bench rope\n\n| a |" in text


# -------------------------------------------------------------------------------------------------
# The tests on a GPU in parts


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Of six tests: one fails, one is skipped, one kills its process, one has no CUDA any more."""
    folder = tmp_path / "tests" / "folder"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(
        textwrap.dedent("""
        import os, pytest
        def test_passes(): pass
        def test_fails(): assert 1 == 2
        def test_kills(): os._exit(3)
        def test_loses(): raise RuntimeError("CUDA error: an illegal memory access")
        @pytest.mark.skip(reason="no")
        def test_skipped(): pass
        def test_last(): pass
        """)
    )
    monkeypatch.setattr(suite, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(suite, "BUILD", tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'bench'}")
    return tmp_path / "suite-folder"


@pytest.mark.thorough
def test_a_suite_goes_on_behind_a_crash(logs):
    suite.open_logs(logs, "")
    for index in range(2):
        suite.run_part("folder", logs, Deadline(400), index, 2)
    verdict = suite.verdict([logs / f"{index}.jsonl" for index in range(2)], 2)
    assert verdict.line == (
        "5 of 6 ran, 2 passed, 2 failed, 1 skipped, 1 ended their process; 2 processes"
    )
    bad = {entry["test"].split("::")[1]: entry for entry in verdict.content["bad"]}
    assert not verdict.ok and set(bad) == {"test_fails", "test_kills", "test_loses"}
    assert bad["test_fails"]["why"] == "assert 1 == 2"


@pytest.mark.thorough
def test_a_suite_goes_on_where_it_was_cut(logs, monkeypatch):
    """And begins anew once it is through."""
    memory = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    monkeypatch.setattr(suite, "about", lambda: {"card": CARD})
    monkeypatch.setattr(suite, "processes", lambda *_: 1)
    monkeypatch.setattr(suite, "sources", str)
    monkeypatch.setattr(suite, "REST", 400.0)
    some = suite.TESTS / "folder" / "test_some.py"
    text, slow = some.read_text(), "import time; time.sleep(5)"  # time is up as the first test ends
    some.write_text(text.replace("test_passes(): pass", f"test_passes(): {slow}"))
    verdict = suite.run("folder", Deadline(405))
    assert verdict.line.startswith("1 of 6 ran") and "; 5 left: run the step" in verdict.line
    some.write_text(text)
    log = logs / "0.jsonl"
    with log.open("a") as file:
        file.write('{"test": "test_some.py::test_')  # cut as it was written
    monkeypatch.setattr(suite, "REST", 1.0)
    verdict = suite.run("folder", Deadline(400))
    assert verdict.line.startswith("5 of 6 ran") and "left" not in verdict.line and not verdict.ok
    assert not logs.exists()


def test_tests_that_never_were_collected_are_no_success(tmp_path):
    assert not suite.verdict([], 1).ok
    one = tmp_path / "one.jsonl"
    one.write_text('{"tests": 1}\n{"test": "a", "state": "passed"}\n')
    assert suite.verdict([one], 1).ok
    verdict = suite.verdict([one, tmp_path / "none.jsonl"], 2)
    assert not verdict.ok and verdict.line.startswith("a process collected no tests")


def test_folders_and_processes():
    assert "rope" in steps.SUITES and not {"pages", "support"} & set(steps.SUITES)
    for name in suite.OF_THE_HOST:
        assert (ROOT / "tests" / "gpu" / f"test_gpu_{name}.py").exists(), name
    assert [suite.processes(*card) for card in ((24, 16), (80, 16), (4, 16))] == [7, 16, 1]
