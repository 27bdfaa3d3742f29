"""The steps of `make gpu`, as far as they can be told without a GPU."""

from __future__ import annotations

import json
import runpy
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gpu import bounds, build, command, step, suite
from gpu.step import Deadline, Verdict

ROOT = Path(__file__).parents[2]
RUN = ROOT / "bench" / "gpu" / "run.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_nothing_runs_and_that_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RUN), "smoke"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(str(RUN), run_name="__main__")
    assert capsys.readouterr().out == "gpu: no CUDA device, nothing was run\n"


def test_an_unknown_step_is_told_the_known_ones(capsys):
    assert command.main(["smoek"]) == 2
    assert "STEP must be one of ['build', 'smoke'," in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(command.STEPS)


def test_a_step_that_dies_or_hangs_has_a_verdict(monkeypatch, tmp_path, capsys):
    program = tmp_path / "run.py"
    monkeypatch.setattr(command, "RUN", program)
    monkeypatch.setattr(step, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "folder", lambda card: tmp_path / card)
    for source, ok, line in (
        ("print('smoke: all right\\n[a warning as it ends]')", True, "all right"),
        ("print('smoke: some wrong'); raise SystemExit(1)", False, "some wrong"),
        ("print('at kernel 3'); import os; os.abort()", False, "ended with status -6 after"),
        (
            "print('at 4', flush=True); import time; time.sleep(60)",
            False,
            "ended with status -9 after",
        ),
    ):
        program.write_text(source)
        monkeypatch.setattr(command, "KILLED", 2.0 if "sleep" in source else 60.0)
        verdict = command.apart("smoke", "some card")
        assert verdict.ok == ok and line in verdict.line
    assert verdict.line.endswith("at: at 4")
    kept = json.loads((tmp_path / "some card" / "smoke.json").read_text())
    assert kept["verdict"] == verdict.line and not kept["ok"]


@pytest.mark.thorough
def test_what_a_step_kept_outlives_it(monkeypatch, tmp_path):
    """Once it is ended from outside; what an earlier run of it left does not."""
    folder = tmp_path / "gpu-some-card"
    program = tmp_path / "run.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, pathlib, sys, time
        sys.path.insert(0, {str(ROOT / "bench")!r})
        from gpu import build, command, step
        card = {{"card": "some card", "torch": "2.15", "when": time.time()}}
        build.about = lambda: card
        command.folder = lambda card: pathlib.Path({str(folder)!r})

        def rows(deadline):
            deadline.keep(step.Verdict(False, "1 of 2 rows measured", {{"rows": [1.5]}}))
            os.abort()

        command.STEPS = {{"bench": step.Step(rows, "")}}
        command.here("bench")
        """)
    )
    monkeypatch.setattr(command, "RUN", program)
    monkeypatch.setattr(command, "folder", lambda card: folder)
    for before in ("; before: 1 of 2 rows measured", ""):
        verdict = command.apart("bench", "some card")
        kept = json.loads((folder / "bench.json").read_text())
        assert not verdict.ok and kept["verdict"] == verdict.line
        assert verdict.line.startswith("ended with status -6 after")
        assert verdict.line.endswith(before or "at: ")
        assert kept.get("rows") == ([1.5] if before else None)
        assert kept.get("torch") == ("2.15" if before else None)
        program.write_text("import os; os.abort()")


@pytest.mark.parametrize(
    ("cuda", "nvcc", "triton", "ok"),
    [
        (None, True, "3.9", True),
        ("ninja not found: pip install ninja", True, "3.9", False),
        ("nvcc not found", False, "3.9", True),
        ("nvcc not found", False, "", False),
    ],
)
def test_a_library_that_nvcc_could_have_built_is_missed(monkeypatch, cuda, nvcc, triton, ok):
    monkeypatch.setattr(build._ext, "load", lambda name: cuda if name == "cuda" else None)
    monkeypatch.setattr(build, "nvcc_is_there", lambda: nvcc)
    monkeypatch.setattr(build, "installed", lambda name: triton if name == "triton" else "")
    monkeypatch.setattr(build.cli, "info", lambda: "")
    verdict = build.run(Deadline())
    assert verdict.ok == ok and f"cuda library: {cuda or 'built'}" in verdict.line
    assert ("though nvcc is there" in verdict.line) == (nvcc and not ok)


def test_results_are_filed_under_the_card_and_make_one_table(tmp_path):
    where = step.folder("NVIDIA H200", tmp_path)
    about = {"card": "NVIDIA H200", "torch": "2.15", "triton": "3.9", "commit": "abc+"}
    rows = {"table": {"head": ["a", "b"], "rows": [["x|y", 1]]}}
    step.save("suite rope", Verdict(False, "3 of 4 ran"), {**about, "when": 2}, where)
    (where / "rope.json").write_text('{"machine": {}, "rows": []}')  # of `make bench`
    step.save("bench", Verdict(True, "all measured", rows), {**about, "when": 1}, where)
    text = (where / "README.md").read_text()
    assert where.name == "gpu-h200" and text.startswith("# NVIDIA H200\n")
    assert text.index("| bench | yes | all measured |") < text.index("| suite rope | **no** | 3 of")
    assert "torch 2.15, triton 3.9, commit abc+" in text and "| x/y | 1 |" in text


# -------------------------------------------------------------------------------------------------
# bench


def test_bounds_are_those_of_the_card():
    from gpu import rows

    h100, h200 = map(bounds.card_of, ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
    known = {kernel for kernel, _, _ in bounds.audited()}
    for timing in rows.timings():
        assert {kernel for kernel, _ in timing.launches} <= known, timing.name
        assert "LEX" in timing.name or bounds.bound(timing.launches, h100)[0] > 0
    merged = [bounds.bound([("merge", "two sets")], card) for card in (h100, h200)]
    assert merged[0][0] / merged[1][0] == pytest.approx(4.8 / 3.35) and merged[0][1] == "memory"
    products = [bounds.bound([("attention", "no window")], card) for card in (h100, h200)]
    assert products[0] == products[1] and products[0][1] == "tensor"
    for unknown in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA L4"):
        assert bounds.card_of(unknown) is None
    assert bounds.bound([("merge", "two sets")], None) is None


def test_rows_are_kept_one_by_one(monkeypatch):
    from gpu import rows

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    kept: list[Verdict] = []
    every = [rows.Timing(name, "1", (), lambda: "needs nvcc") for name in "abc"]
    verdict = rows.run_all(every, Deadline(keep=kept.append))
    assert [len(one.content["rows"]) for one in kept] == [1, 2, 3]
    assert [one.ok for one in kept] == [False, False, True] and kept[-1] == verdict


def test_a_row_that_fails_fails_the_step():
    from gpu import rows

    def broken():
        raise RuntimeError("CompilationError: at 3:4")

    failed = rows.measure(rows.Timing("a", "1", (), broken), "some card")
    absent = rows.measure(rows.Timing("b", "1", (), lambda: "needs nvcc"), "some card")
    peers = {"slow": lambda: torch.randn(9), "none": "not installed", "bad": broken}
    made = rows.Timed(lambda: torch.randn(9), peers)
    good = rows.measure(rows.Timing("c", "1", (), lambda: made), "some card")
    assert failed.absent.startswith("FAILED RuntimeError: CompilationError")
    assert good.peers["slow"]["ours_over_it"] > 0 and good.peers["bad"].startswith("RuntimeError")
    verdict = rows.verdict([failed, absent, good], 3, "some card")
    assert not verdict.ok and verdict.line.startswith(
        "1 of 3 rows measured, 1 failed; the audit has"
    )
    assert rows.verdict([absent, good], 2, "NVIDIA H200").ok
    assert not rows.verdict([absent, good], 3, "NVIDIA H200").ok  # out of time


# -------------------------------------------------------------------------------------------------
# The tests on a GPU in parts


@pytest.fixture
def some_tests(tmp_path, monkeypatch):
    """Six tests: one fails, one is skipped, one kills its process, one has no CUDA any more."""
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
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'bench'}")
    logs = tmp_path / "logs"
    logs.mkdir()
    return logs


@pytest.mark.thorough
def test_a_suite_goes_on_behind_a_crash(some_tests):
    for index in range(2):
        suite.part("folder", index, 2, some_tests, Deadline(100))
    verdict = suite.verdict([some_tests / f"{index}.jsonl" for index in range(2)], 2)
    assert verdict.line == (
        "5 of 6 ran, 2 passed, 2 failed, 1 skipped, 1 started and never ended; 2 processes; "
        "1 left: run the step again, it goes on there"
    )
    assert not verdict.ok
    bad = {entry["test"].split("::")[1]: entry for entry in verdict.content["bad"]}
    assert set(bad) == {"test_fails", "test_kills", "test_loses"}
    assert bad["test_fails"]["why"] == "assert 1 == 2"


class OneTest(Deadline):
    """Time for one call of pytest, which is up when its first test has ended."""

    def __init__(self) -> None:
        self.end, self.lefts = 0.0, [100.0, 100.0]

    @property
    def left(self) -> float:
        return self.lefts.pop() if self.lefts else 0.0


@pytest.mark.thorough
def test_a_suite_goes_on_where_it_was_cut(some_tests, monkeypatch):
    """And begins anew once it is through, or with other sources."""
    memory = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    monkeypatch.setattr(suite, "BUILD", some_tests)
    monkeypatch.setattr(suite, "made_with", lambda: "these sources")
    monkeypatch.setattr(suite, "workers", lambda *_: 1)
    log = some_tests / "suite-folder" / "0.jsonl"
    verdict = suite.run("folder", OneTest())
    assert verdict.line.startswith("1 of 6 ran") and "; 5 left: run the step" in verdict.line
    with log.open("a") as file:
        file.write('{"test": "test_some.py::test_')  # cut as it was written
    verdict = suite.run("folder", Deadline(100))
    assert verdict.line.startswith("5 of 6 ran") and "; 1 left: run the step" in verdict.line
    assert log.read_text().count('::test_passes", "state": "passed"') == 1
    # What killed its process is tried once more, and no third time.
    verdict = suite.run("folder", Deadline(100))
    assert verdict.line.startswith("5 of 6 ran") and "left" not in verdict.line and not verdict.ok
    assert log.read_text().count('::test_kills", "state": "started"') == 2
    assert log.read_text().count('::test_fails", "state": "failed"') == 1
    suite.open_logs(log.parent, "these sources")
    assert not log.exists()
    log.write_text("")
    suite.open_logs(log.parent, "these sources")
    assert log.exists()
    suite.open_logs(log.parent, "others")
    assert not log.exists()


def test_tests_that_never_were_collected_are_no_success(tmp_path):
    assert not suite.verdict([], 1).ok
    assert suite.verdict([tmp_path / "none.jsonl"], 1).line.startswith("no tests were collected")
    one = tmp_path / "one.jsonl"
    one.write_text('{"tests": 1}\n{"test": "a", "state": "passed"}\n')
    assert suite.verdict([one], 1).ok
    verdict = suite.verdict([one, tmp_path / "none.jsonl"], 2)
    assert not verdict.ok and "; 1 processes collected no tests" in verdict.line


def test_folders_and_processes():
    assert suite.folders()[0] == "rope" and not {"evaluation", "support"} & set(suite.folders())
    for name in suite.LEFT_OUT:
        assert (ROOT / "tests" / name).exists(), name
    assert suite.workers(24, 16) == 7 and suite.workers(80, 16) == 16 and suite.workers(4, 16) == 1
