"""The tests on a GPU in parts, as `make gpu` runs them: told without one."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from gpu import suite
from gpu.step import Deadline

ROOT = Path(__file__).parents[2]


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


def test_a_suite_out_of_time_says_how_far_it_came(some_tests):
    suite.part("folder", 0, 1, some_tests, Deadline(suite.REST + 0.001))
    verdict = suite.verdict(sorted(some_tests.glob("*.jsonl")), 1)
    assert not verdict.ok and verdict.line.startswith("1 of 6 ran, 1 passed, 0 failed")


class OneTest(Deadline):
    """Time for one call of pytest, which is up when its first test has ended."""

    def __init__(self) -> None:
        self.end, self.lefts = 0.0, [100.0, 100.0]

    @property
    def left(self) -> float:
        return self.lefts.pop() if self.lefts else 0.0


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


def test_the_sources_are_those_that_tests_see(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    found = {suite.sources()}
    for text in ("a", "b"):
        (tmp_path / "tests" / "test_some.py").write_text(text)
        found.add(suite.sources())
    (tmp_path / "tests" / "some.pyc").write_text("compiled")
    assert len(found) == 3 and suite.sources() in found


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
