"""What `make gpu` checks, launches and tunes: told without a GPU."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu import smoke, tune
from gpu.results import Deadline
from machine_code import CHIPS
from support import operations

from extrope_kernels.ops.attention.triton import configs
from extrope_kernels.testing import available_backends

ROOT = Path(__file__).parents[2]


# -------------------------------------------------------------------------------------------------
# smoke


def test_every_kernel_is_asked_for():
    folder = ROOT / "extrope_kernels" / "ops"
    sources = [path for path in folder.rglob("*.py") if "triton" in path.parts]
    names = [
        x for path in sources for x in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    ]
    texts = [path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.[ch]*")]
    names += {x for text in texts for x in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text)}
    # Two are called rotate_kernel.
    assert Counter(names) == Counter(x for kernels in smoke.KERNELS.values() for x in kernels)


@pytest.mark.thorough
def test_every_check_launches_its_kernels(run_python):
    """Launches are counted, and none is made."""
    run_python(
        """
        import sys; sys.path[:0] = ["bench", "tests"]
        from extrope_kernels import testing
        from triton.runtime.interpreter import InterpretedFunction

        launched = set()
        InterpretedFunction.run = lambda self, *args, **kwargs: launched.add(self.fn.__name__)
        # As on a GPU; what nothing has computed is not to end a check.
        testing.available_backends = lambda: ["reference", "triton"]
        testing.attention_backends = lambda: ["reference", "triton"]
        testing.assert_within_budget = lambda *args, **kwargs: None
        import torch
        from support import attention_oracle, operations
        from gpu import smoke

        attention_oracle.check_outputs = lambda *args: None
        operations.everywhere = lambda: [("rope", "triton")]
        smoke.DTYPES = (torch.bfloat16,)
        seen = {}
        for name, backend, check in smoke.checks():
            launched.clear()
            smoke.error_of(check)
            seen.setdefault((name, backend), set()).update(launched)
        # A merge is Triton's on a GPU alone: test_launches.py launches its kernel.
        missed = smoke.never_launched(seen, ["triton"])
        assert missed == ["merge_kernel by merge (triton)"], missed
        """,
        TRITON_INTERPRET="1",
    )


@pytest.mark.skipif("cpu" not in available_backends(), reason="of the CPU's kernels")
def test_checks_pass_and_tell_what_is_wrong(monkeypatch):
    assert ("rope", "cpu") in [(name, backend) for name, backend, _ in smoke.checks()]
    sizes = {"seqlen_q": 33, "head_dim": 32}
    assert (
        smoke.error_of(partial(smoke.check_attention, "rerope", "cpu", torch.float32, **sizes))
        == ""
    )
    for name in smoke.BY_REFERENCE:
        assert smoke.error_of(partial(smoke.check_by_reference, name, "cpu", torch.float32)) == ""
    one = operations.OPERATIONS["rope"]

    def wrong(backend, **given):
        return [x + (backend == "cpu") for x in one.function(**given, backend=backend)]

    table = {"rope": replace(one, function=wrong)}
    monkeypatch.setattr(operations, "OPERATIONS", table)
    error = smoke.error_of(partial(smoke.check_by_reference, "rope", "cpu", torch.bfloat16))
    assert error.startswith("AssertionError: result 0: error")


def test_kernels_are_checked_as_triton_finds_them_and_as_kept():
    ways = iter((True, True, True, False, False))

    def check():
        assert next(ways), "wrong"

    assert smoke.error_both_ways(check) == ""
    assert smoke.error_both_ways(check) == "by kept kernels: AssertionError: wrong"
    assert smoke.error_both_ways(check) == "AssertionError: wrong"


def test_a_kernel_does_not_stand_for_another_of_its_name():
    seen = {key: set(kernels) for key, kernels in smoke.KERNELS.items()}
    seen["rope", "cuda"] = {"void extrope::(anonymous namespace)::rope_kernel<float, 4>(Params)"}
    both = ["triton", "cuda"]
    assert smoke.never_launched(seen, both) == []
    assert smoke.never_launched({("rope", "cuda"): {"Memcpy HtoD"}}, both) is None
    seen["rope", "triton"] = {"norm_rotate_kernel"}
    assert smoke.never_launched(seen, both) == ["rotate_kernel by rope (triton)"]
    assert smoke.never_launched(seen, ["cuda"]) == []


def test_smoke_fails_by_what_is_wrong_not_run_or_never_launched():
    assert smoke.verdict(4, 4, [], []).ok
    assert smoke.verdict(4, 4, [], None).line.endswith("is not known")
    for case in ((0, 0, [], None), (4, 3, [], []), (4, 4, ["rope"], []), (4, 4, [], ["dq_kernel"])):
        assert not smoke.verdict(*case).ok
    assert smoke.verdict(4, 3, ["a"], []).line.startswith("2 of 4 checks passed, 1 failed, 1 not")


# -------------------------------------------------------------------------------------------------
# tune


def leaf(block_m, **more):
    return {"block_m": block_m, "block_n": 64, "warps": 8, "stages": 2, **more}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """sm_80 up to head_dim 64 and 128, sm_90 up to 128. Returns a reader of dq's rows."""
    path = tmp_path / "configs.json"
    rows = {"dq": {"80": {"64": leaf(16), "128": leaf(32)}, "90": {"128": leaf(64)}}}
    candidates = {"dq": {"80": {"64": [leaf(128), leaf(16)], "128": [leaf(64)]}}}
    path.write_text(json.dumps(rows))
    path.with_name("candidates.json").write_text(json.dumps(candidates))
    monkeypatch.setattr(configs, "TABLE", path)
    configs.table.cache_clear()
    yield lambda: json.loads(path.read_text())["dq"]
    configs.table.cache_clear()


@pytest.mark.parametrize("kernel", tune.KERNELS.values())
@pytest.mark.parametrize("measured", [80, 89, 103, 121])
def test_a_winner_changes_no_other_audited_chip(tmp_path, monkeypatch, kernel, measured):
    """In the tables that ship; one token's has rows of sm_80 and sm_120 alone."""

    def tiles() -> dict:
        return {
            (chip, dim, size): configs.leaf(kernel, dim, size, chip)
            for chip in (*CHIPS, measured, "gfx942")
            for dim in (32, 64, 96, 128, 192, 256)
            for size in (2, 4)
        }

    shipped = json.loads(configs.TABLE.read_text())
    for by_dim in shipped[kernel].values():  # as if none had been measured yet
        by_dim.update({dim: tune.fields_of(leaf) for dim, leaf in by_dim.items()})
    monkeypatch.setattr(configs, "TABLE", tmp_path / "configs.json")
    configs.TABLE.write_text(json.dumps(shipped))
    configs.table.cache_clear()
    before = tiles()
    tune.replace(kernel, measured, 128, leaf(16), "some card")
    after = tiles()
    configs.table.cache_clear()
    changed = {key for key in before if before[key] != after[key]}
    assert changed and {(chip, size) for chip, _, size in changed} == {(measured, 2)}
    assert (measured, 128, 2) in changed and (measured, 256, 2) not in changed
    assert {chip for (chip, _, _), x in after.items() if "measured" in x} == {measured}


def test_each_time_is_kept_and_a_winner_must_gain(table, monkeypatch):
    kept, times, fields = [], [2.0, 1.99, 1.0, RuntimeError("does not fit")], []
    monkeypatch.setattr(tune, "problem", lambda name, dim: (lambda: None, lambda: None))
    monkeypatch.setattr(
        tune, "forced", lambda *given: fields.append(given) or contextlib.nullcontext()
    )

    def timed(call, seconds):
        time = times.pop(0)
        if isinstance(time, Exception):
            raise time
        return [time]

    monkeypatch.setattr(tune, "paired", timed)
    about = {"capability": 80, "card": "NVIDIA A100"}
    monkeypatch.setattr(tune, "about", lambda: about)
    verdict = tune.run("dq", Deadline(keep=lambda verdict: kept.append(verdict.line)))
    assert [line.split(";")[0] for line in kept] == [
        f"{n} of 4 configurations timed, {refused} refused"
        for n, refused in ((1, 0), (2, 0), (3, 0), (3, 1))
    ]
    assert verdict.ok and "written: 128: block_m 32" in verdict.line  # 1.99 is no gain
    assert "RuntimeError: does not fit" in verdict.content["table"]
    assert table()["80"]["64"] == leaf(16, measured=True, card="NVIDIA A100")


# -------------------------------------------------------------------------------------------------
# End to end, over the driver that launches nothing


@pytest.mark.thorough
def test_the_steps_run_over_a_driver_that_launches_nothing(run_python, tmp_path):
    run_python(
        f"""
        import json, sys; sys.path[:0] = ["bench", "tests"]
        from contextlib import contextmanager
        from functools import partial
        from pathlib import Path
        from types import SimpleNamespace
        import null_driver, torch

        driver = null_driver.install()
        torch.cuda.get_device_name = lambda: "NVIDIA nothing"
        torch.cuda.get_device_capability = lambda: (9, 0)
        torch.cuda.synchronize = lambda: None
        from extrope_kernels import testing
        testing.available_backends = testing.attention_backends = lambda: ["reference", "triton"]
        testing.assert_within_budget = lambda *args, **kwargs: None
        from support import attention_oracle, operations
        attention_oracle.check_outputs = lambda *args: None
        operations.everywhere = lambda: [("rope", "triton")]
        from gpu import results, smoke, steps, timing, tune

        results.RESULTS = Path({str(tmp_path)!r})
        smoke.DTYPES, smoke.SCORES, smoke.CACHED = (torch.bfloat16,), ("rerope",), ("rerope",)
        steps.Deadline = partial(results.Deadline, 3600.0)  # it compiles on a busy machine
        where = results.folder("NVIDIA nothing")

        @contextmanager
        def profile(activities):
            driver.launches.clear()
            yield SimpleNamespace(
                key_averages=lambda: [SimpleNamespace(key=name) for name in driver.launches]
            )

        def ran(step):
            code = steps.run_here(step)
            return code, json.loads(results.path_of(step, where).read_text())

        smoke.profile = profile
        _, found = ran("smoke")
        assert found["errors"] == [], found
        assert found["never_launched"] == ["merge_kernel by merge (triton)"], found

        shipped = tune.candidates("one_token", 90)[128]
        tune.candidates = lambda kernel, chip: {{128: shipped[:2]}}
        tune.replace = lambda *given: None
        code, found = ran("tune decode")
        assert code == 0 and found["verdict"].startswith("2 of 2 configurations timed"), found

        import bench_rope
        bench_rope.backends = lambda: {{"triton": "triton"}}
        script, cases, _ = timing.TIMED["rope"]
        timing.TIMED["rope"] = script, cases, ("--quick", "--out", str(where))
        code, found = ran("bench rope")
        assert code == 0 and found["verdict"].startswith("3 rows measured"), found
        assert "| forward, half-split |" in (where / "README.md").read_text()
        """,
        TRITON_INTERPRET="0",
        EXTROPE_TRITON_CHIP="90",
    )
