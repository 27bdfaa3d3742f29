"""The steps of `make gpu`, as far as they can be told without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu import bounds, command, sanitizer, smoke, step, suite
from gpu.step import Deadline, Verdict

from extrope_kernels.testing import available_backends

ROOT = Path(__file__).parents[2]
RUN = ROOT / "bench" / "gpu" / "run.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_nothing_runs_and_that_is_an_error():
    done = subprocess.run([sys.executable, str(RUN), "smoke"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "gpu: no CUDA device, nothing was run\n"


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
        monkeypatch.setattr(command, "KILLED", 5.0 if "sleep" in source else 60.0)
        verdict = command.apart("smoke", "some card")
        assert verdict.ok == ok and line in verdict.line
    assert verdict.line.endswith("at: at 4")
    kept = json.loads((tmp_path / "some card" / "smoke.json").read_text())
    assert kept["verdict"] == verdict.line and not kept["ok"]


def test_results_are_filed_under_the_card_and_make_one_table(tmp_path):
    assert step.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert step.slug("NVIDIA GeForce RTX 4090") == "rtx-4090"
    where = step.folder("NVIDIA H200", tmp_path)
    about = {"card": "NVIDIA H200", "torch": "2.15", "triton": "3.9", "commit": "abc+"}
    rows = {"table": {"head": ["a", "b"], "rows": [["x|y", 1]]}}
    step.save("suite rope", Verdict(False, "3 of 4 ran"), {**about, "when": 2}, where)
    step.save("bench", Verdict(True, "all measured", rows), {**about, "when": 1}, where)
    text = (where / "README.md").read_text()
    assert where.name == "gpu-h200" and text.startswith("# NVIDIA H200\n")
    assert text.index("| bench | yes | all measured |") < text.index("| suite rope | **no** | 3 of")
    assert "torch 2.15, triton 3.9, commit abc+" in text and "| x/y | 1 |" in text


# -------------------------------------------------------------------------------------------------
# smoke and the sanitizer


def test_every_kernel_has_an_operation_that_launches_it(run_python):
    """The interpreter's launches are counted, and none is made."""
    run_python(
        """
        import sys; sys.path[:0] = ["bench", "tests/support"]
        from triton.runtime.interpreter import InterpretedFunction

        launched = set()
        InterpretedFunction.run = lambda self, *args, **kwargs: launched.add(self.fn.__name__)
        from extrope_kernels import _ext
        from gpu import smoke
        from operations import OPERATIONS

        import torch, operations

        every = [(name, "triton") for name, one in OPERATIONS.items() if "triton" in one.backends]
        operations.everywhere = lambda: every
        for name, backend in smoke.alone():
            OPERATIONS[name].run(backend, **OPERATIONS[name].inputs(torch.bfloat16))
        _ext._reasons["cuda"] = None
        # Which are CUDA C++.
        norms = {f"norm_{name}_kernel" for name in ("forward", "backward", "sum")}
        assert smoke.kernels() - launched == {"rope_kernel", *norms}
        """,
        TRITON_INTERPRET="1",
    )


@pytest.mark.skipif("cpu" not in available_backends(), reason="of the CPU's kernels")
def test_checks_pass_and_tell_what_is_wrong(monkeypatch):
    import operations
    from gpu import checks

    names = [name for name, _ in checks.checks()]
    assert len(names) == len(set(names)) and "rope, backward, cpu, bfloat16" in names
    assert smoke.error_of(lambda: checks.same("rope", "cpu", torch.bfloat16)) == ""
    sizes = {"seqlen_q": 33, "head_dim": 32}
    assert smoke.error_of(lambda: checks.attention("rerope", "cpu", torch.float32, **sizes)) == ""
    assert smoke.error_of(lambda: checks.append("cpu", torch.bfloat16)) == ""
    one = operations.OPERATIONS["rope"]

    def wrong(backend, **tensors):
        return [x + (backend == "cpu") for x in one.run(backend, **tensors)]

    table = {"rope": operations.Operation(wrong, one.shapes, one.backends)}
    monkeypatch.setattr(operations, "OPERATIONS", table)
    error = smoke.error_of(lambda: checks.same("rope", "cpu", torch.bfloat16))
    assert error.startswith("AssertionError: result 0: error")


def test_smoke_fails_by_what_is_wrong_not_run_or_never_launched():
    seen = {"void at::vectorized_kernel<4>(int)", "void rope::rope_kernel<float>(RopeParams)"}
    assert smoke.never_launched({"Memcpy HtoD"}) is None
    assert "forward_kernel" in smoke.never_launched(seen)
    assert smoke.never_launched(seen | smoke.kernels()) == []
    assert smoke.verdict(4, 4, [], []).ok
    assert smoke.verdict(4, 4, [], None).line.endswith("is not known")
    for case in ((4, 3, [], []), (4, 4, ["rope"], []), (4, 4, [], ["dq_kernel"])):
        assert not smoke.verdict(*case).ok
    assert smoke.verdict(4, 3, ["rope"], []).line.startswith(
        "2 of 4 checks passed, 1 failed, 1 not"
    )


def test_the_sanitizer_says_how_far_it_came():
    summary = "========= ERROR SUMMARY: 0 errors"
    passed = sanitizer.verdict("memcheck", ["ran 1 of 2: a", "ran 2 of 2: b", summary], 0)
    assert passed.ok and passed.line == "2 of 2 operations ran; ERROR SUMMARY: 0 errors"
    late = sanitizer.verdict("memcheck", ["ran 1 of 2: a", summary], 0)
    assert not late.ok and late.line.startswith("1 of 2 operations ran")
    read = "========= Invalid __global__ read"
    wrong = sanitizer.verdict("memcheck", ["ran 2 of 2: b", read, summary], 9)
    assert not wrong.ok and "Invalid __global__ read" in wrong.content["said"]


def test_a_missing_sanitizer_is_told(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    verdict = sanitizer.memcheck(Deadline())
    assert verdict.line == "compute-sanitizer is not installed: nothing was checked"


# -------------------------------------------------------------------------------------------------
# suite


@pytest.fixture
def some_tests(tmp_path, monkeypatch):
    """Six tests: one fails, one is skipped, one kills its process, one has no CUDA any more."""
    room = tmp_path / "tests" / "room"
    room.mkdir(parents=True)
    (room / "test_some.py").write_text(
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
        suite.part("room", index, 2, some_tests, Deadline(100))
    verdict = suite.verdict([some_tests / f"{index}.jsonl" for index in range(2)], 2)
    assert verdict.line == (
        "5 of 6 ran, 2 passed, 2 failed, 1 skipped, 1 started and never ended; 2 processes"
    )
    assert not verdict.ok
    bad = {entry["test"].split("::")[1]: entry for entry in verdict.content["bad"]}
    assert set(bad) == {"test_fails", "test_kills", "test_loses"}
    assert bad["test_fails"]["why"] == "assert 1 == 2"


def test_a_suite_out_of_time_says_how_far_it_came(some_tests):
    suite.part("room", 0, 1, some_tests, Deadline(suite.REST + 0.001))
    verdict = suite.verdict(sorted(some_tests.glob("*.jsonl")), 1)
    assert not verdict.ok and verdict.line.startswith("1 of 6 ran, 1 passed, 0 failed")


def test_tests_that_never_were_collected_are_no_success(tmp_path):
    assert not suite.verdict([], 1).ok
    assert suite.verdict([tmp_path / "none.jsonl"], 1).line.startswith("no tests were collected")


def test_rooms_and_processes():
    assert suite.rooms()[0] == "rope" and not {"evaluation", "support"} & set(suite.rooms())
    for name in suite.LEFT_OUT:
        assert (ROOT / "tests" / name).exists(), name
    assert suite.workers(24, 16) == 7 and suite.workers(80, 16) == 16 and suite.workers(4, 16) == 1


# -------------------------------------------------------------------------------------------------
# bench


def test_every_bound_is_one_that_the_audit_knows():
    from audit.entries import all_cases
    from gpu import rows

    known = {(case.kernel, case.variant, case.dtype) for case in all_cases()}
    for timing in rows.timings():
        dtype = rows.dtype_of(timing.launches)
        for launch in timing.launches:
            assert (*launch, dtype) in known, timing.name
        found = bounds.bound(timing.launches, bounds.card_of("NVIDIA H100 80GB HBM3"), dtype)
        assert found is None if not timing.launches else found[0] > 0


def test_bounds_are_those_of_the_card():
    h100, h200 = map(bounds.card_of, ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
    copied = [bounds.bound([("plain copy", "")], card) for card in (h100, h200)]
    assert copied[0][0] / copied[1][0] == pytest.approx(4.8 / 3.35) and copied[0][1] == "memory"
    products = [bounds.bound([("attention forward", "R1")], card) for card in (h100, h200)]
    assert products[0] == products[1] and products[0][1] == "tensor"
    for unknown in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA L4"):
        assert bounds.card_of(unknown) is None
    assert bounds.bound([("plain copy", "")], None) is None


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
