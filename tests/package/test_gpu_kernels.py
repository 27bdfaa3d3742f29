"""What `make gpu` checks, launches and tunes, and the sanitizer: told without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu import launches, sanitizer, smoke, tune
from gpu.config_table import ConfigTable, dumped, fields_of
from gpu.launches import Kernel, Source
from gpu.step import Deadline
from gpu_audit import MEASURED_STACK
from machine_code import CHIPS

from extrope_kernels.testing import available_backends

ROOT = Path(__file__).parents[2]


def test_every_kernel_is_asked_for():
    """By its backend and op: names alone are not unique."""
    folder = ROOT / "extrope_kernels" / "ops"
    sources = [path for path in folder.rglob("*.py") if "triton" in path.parts]
    found = {
        Kernel("triton", path.relative_to(folder).parts[0], name)
        for path in sources
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert found == {kernel for kernel in launches.OPERATIONS if kernel.backend == "triton"}
    texts = [path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.[ch]*")]
    names = {name for x in texts for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", x)}
    assert {kernel.name for kernel in launches.OPERATIONS if kernel.backend == "cuda"} == names


def test_every_kernel_has_an_operation_that_launches_it(run_python):
    """Those for the sanitizer, and the checks: launches are counted, and none is made."""
    run_python(
        """
        import sys; sys.path[:0] = ["bench", "tests/support"]
        from extrope_kernels import testing
        from triton.runtime.interpreter import InterpretedFunction

        launched = set()
        def launch(self, *args, **kwargs):
            launched.add(("triton", self.fn.__module__.split(".")[2], self.fn.__name__))
        InterpretedFunction.run = launch
        # As on a GPU; what nothing has computed is not to end a check.
        testing.available_backends = lambda: ["reference", "triton", "cuda"]
        testing.attention_backends = lambda: ["reference", "triton"]
        testing.assert_within_budget = lambda *args, **kwargs: None
        import attention_oracle, operations, torch
        from gpu import checks, launches, smoke

        attention_oracle.check_outputs = lambda *args: None
        operations.everywhere = lambda: [
            (name, backend) for name, one in operations.OPERATIONS.items()
            for backend in one.backends
        ]
        checks.DTYPES = (torch.bfloat16,)
        # A merge is Triton's on a GPU alone: test_launches.py launches its kernel.
        of = {kernel: name for kernel, name in launches.OPERATIONS.items() if name != "merge"}
        triton = {kernel for kernel in of if kernel.backend == "triton"}

        for name, backend in smoke.alone():
            if backend == "triton":
                one = operations.OPERATIONS[name]
                one.run(backend, **one.inputs(torch.bfloat16))
        assert launched == triton, launched ^ triton

        seen = {}
        for name, check in checks.checks():
            launched.clear()
            source = launches.source_of(name)
            if source.backend == "triton":
                smoke.error_of(check)
            seen[source] = set(launched)
        for kernel, operation in of.items():
            found = seen[operation, kernel.backend]  # is there such a check?
            assert kernel in found or kernel.backend == "cuda", kernel
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
    for name in ("norm and rope, backward", "norm, rope and append", "rope by cos and sin"):
        assert smoke.error_of(partial(checks.same, name, "cpu", torch.float32)) == "", name
    one = operations.OPERATIONS["rope"]

    def wrong(backend, **tensors):
        return [x + (backend == "cpu") for x in one.run(backend, **tensors)]

    table = {"rope": operations.Operation(wrong, one.shapes, one.backends)}
    monkeypatch.setattr(operations, "OPERATIONS", table)
    error = smoke.error_of(lambda: checks.same("rope", "cpu", torch.bfloat16))
    assert error.startswith("AssertionError: result 0: error")


def seen_on_a_gpu() -> dict[Source, set[str]]:
    """What the profiler would have of each operation, by names as it gives them."""
    seen: dict[Source, set[str]] = {}
    for kernel, operation in launches.OPERATIONS.items():
        name = kernel.name
        if kernel.backend == "cuda":
            name = f"void extrope::(anonymous namespace)::{name}<float, 4>(Params)"
        seen.setdefault(Source(operation, kernel.backend), set()).add(name)
    return seen


def test_a_kernel_does_not_stand_for_another_of_its_name():
    both = ("triton", "cuda")
    every = seen_on_a_gpu()
    assert launches.never_launched(every, both) == []
    assert launches.never_launched({Source("rope", "cuda"): {"Memcpy HtoD"}}, both) is None
    for kernel, operation in launches.OPERATIONS.items():
        seen = {source: set(found) for source, found in every.items()}
        found = seen[operation, kernel.backend]
        found -= {launch for launch in found if kernel.is_seen_as(launch)}
        assert launches.never_launched(seen, both) == [kernel]
        assert launches.never_launched(seen, set(both) - {kernel.backend}) == []
    # A longer name.
    assert not Kernel("cuda", "x", "rotate_kernel").is_seen_as("x::norm_rotate_kernel<2>()")
    assert launches.source_of("rope, backward, cuda, float32") == ("rope, backward", "cuda")


def test_smoke_asks_each_check_for_its_kernels(monkeypatch):
    from gpu import checks

    names = [f"{name}, {backend}, bfloat16" for name, backend in seen_on_a_gpu()]
    monkeypatch.setattr(checks, "checks", lambda: [(name, name) for name in names])
    monkeypatch.setattr(smoke, "available_backends", lambda: ["reference", "triton", "cuda"])
    every = seen_on_a_gpu()
    watched = lambda name: ("", False, every[launches.source_of(name)])  # noqa: E731
    monkeypatch.setattr(smoke, "watched", watched)
    verdict = smoke.run(Deadline())
    assert verdict.ok and verdict.line.endswith("0 failed; every kernel was launched")
    every["rope", "cuda"] = {"rotate_kernel"}
    verdict = smoke.run(Deadline())
    assert verdict.line.endswith("never launched: rope's rope_kernel (cuda)")
    assert verdict.content["never_launched"] == ["rope's rope_kernel (cuda)"]


def test_smoke_fails_by_what_is_wrong_not_run_or_never_launched():
    kernel = Kernel("triton", "attention", "dq_kernel")
    assert smoke.verdict(4, 4, [], []).ok
    assert smoke.verdict(4, 4, [], None).line.endswith("is not known")
    for case in ((0, 0, [], None), (4, 3, [], []), (4, 4, ["rope"], []), (4, 4, [], [kernel])):
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


# -------------------------------------------------------------------------------------------------
# Tables of configurations as files, and the choice among candidates


def leaf(block_m, **more):
    return {"block_m": block_m, "block_n": 64, "warps": 8, "stages": 2, **more}


@pytest.fixture
def table(tmp_path):
    """sm_80 up to head_dim 64 and 128, sm_90 up to 128."""
    configs = {"dq": {"80": {"64": leaf(16), "128": leaf(32)}, "90": {"128": leaf(64)}}}
    candidates = {"dq": {"80": {"64": [leaf(128), leaf(16)], "128": [leaf(64)]}}}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    (tmp_path / "candidates.json").write_text(json.dumps(candidates))
    return ConfigTable(tmp_path)


def test_candidates_are_those_of_the_chip_or_the_one_before(table):
    assert table.candidates("dq", 89) == {64: [leaf(16), leaf(128)], 128: [leaf(32), leaf(64)]}
    assert table.candidates("dq", 90) == {64: [leaf(64), leaf(128), leaf(16)], 128: [leaf(64)]}
    assert table.candidates("dq", 75) == {}


def test_a_winner_is_written_and_nothing_else_changes(table):
    table.replace("dq", 80, 128, leaf(64), "NVIDIA A100")
    configs = json.loads((table.folder / "configs.json").read_text())["dq"]
    assert configs["80"]["128"] == leaf(64, measured=True, card="NVIDIA A100")
    assert configs["80"]["64"] == leaf(16) and configs["90"] == {"128": leaf(64)}
    text = (table.folder / "configs.json").read_text()
    table.replace("dq", 80, 128, leaf(64, measured=True, card="x"), "NVIDIA A100")
    assert (table.folder / "configs.json").read_text() == text == dumped(json.loads(text))
    table.replace("dq", 89, 64, leaf(8), "NVIDIA L4")  # gets rows of its own
    configs = json.loads((table.folder / "configs.json").read_text())["dq"]
    assert list(configs) == ["80", "86", "89", "90"]
    # What was measured on the A100 was not measured here.
    assert configs["89"] == {"64": leaf(8, measured=True, card="NVIDIA L4"), "128": leaf(32)}


@pytest.mark.parametrize(("op", "kernel"), tune.KERNELS.values(), ids=list(tune.KERNELS))
@pytest.mark.parametrize("measured", [80, 89, 103, 121])
def test_a_winner_changes_no_other_audited_chip(tmp_path, monkeypatch, op, kernel, measured):
    """In the tables that ship; one token's has rows of sm_80 and sm_120 alone."""
    configs = importlib.import_module(f"extrope_kernels.ops.{op}.configs")
    monkeypatch.setattr(configs, "TABLE", tmp_path / "configs.json")
    table = tmp_path / "configs.json"
    dims = (32, 64, 96, 128, 192, 256)

    def tiles() -> dict:
        configs.table.cache_clear()
        return {
            (chip, dim, size): configs.leaf(kernel, dim, size, chip)
            for chip in (*CHIPS, measured, "gfx942")
            for dim in dims
            for size in (2, 4)
        }

    shipped = json.loads((ConfigTable.of(op).folder / "configs.json").read_text())
    for by_dim in shipped[kernel].values():  # as if none had been measured yet
        by_dim.update({dim: fields_of(leaf) for dim, leaf in by_dim.items()})
    table.write_text(json.dumps(shipped))
    before = tiles()
    ConfigTable(tmp_path).replace(kernel, measured, 128, leaf(16), "some card")
    after = tiles()
    changed = {key for key in before if before[key] != after[key]}
    assert changed and {(chip, size) for chip, _, size in changed} == {(measured, 2)}
    assert (measured, 128, 2) in changed and (measured, 256, 2) not in changed
    assert after[measured, 128, 2]["card"] == "some card"
    claimed = [key for key, x in after.items() if "measured" in x]
    assert {chip for chip, _, _ in claimed} == {measured}


def test_the_candidates_are_for_the_tuner():
    """Every kernel that it tunes has some for every audited chip, beside the one that ships."""
    for op, kernel in tune.KERNELS.values():
        for chip in CHIPS:
            found = ConfigTable.of(op).candidates(kernel, chip)
            assert len(found[128]) > 2, (kernel, chip)


def test_a_candidate_is_forced_where_launches_look_it_up():
    configs = importlib.import_module("extrope_kernels.ops.attention.triton.configs")
    before = configs.config("dkv", 128, 2, 90)
    with tune.forced("attention.triton", "dkv", 128, leaf(32)):
        assert configs.config("dkv", 128, 2, 90) == configs.Config(32, 64, 8, 2)
        assert configs.config("dkv", 64, 2, 90).block_m != 32 or before.block_m == 32
        assert configs.config("dkv", 128, 4, 90) != configs.Config(32, 64, 8, 2)
        assert configs.config("dq", 128, 2, 90) != configs.Config(32, 64, 8, 2)
    assert configs.config("dkv", 128, 2, 90) == before


def test_the_shipped_configuration_stays_unless_another_gains():
    def timed(*times):
        return [tune.Timed(128, leaf(16 * i), time) for i, time in enumerate(times)]

    assert tune.winner(rows := timed(1.0, 0.995, None)) is rows[0]
    assert tune.winner(rows := timed(1.0, 1.2, 0.9)) is rows[2]
    assert tune.winner(timed(None, 1.0)) is None
    rows = timed(1.0, 0.8, 0.9)
    rows[1].reason = "too much"
    assert tune.winner(rows) is rows[2]


def test_each_time_is_kept_and_a_winner_of_the_spills_is_none(table, monkeypatch):
    """The fastest holds more stack than the tests allow a tile that was measured."""
    kept, stack = [], {"a": 0}

    def problems(op, kernel, dim):
        return (lambda: None), lambda: times.pop(0)

    def forced(op, kernel, dim, fields):
        stack[str(fields)] = {32: 96, 64: MEASURED_STACK, 128: MEASURED_STACK + 4}[
            fields["block_m"]
        ]
        return contextlib.nullcontext()

    monkeypatch.setattr(tune, "forced", forced)
    monkeypatch.setattr(tune, "stack_of_binaries", lambda op, kernel: dict(stack))
    monkeypatch.setitem(sys.modules, "gpu.tune_problems", type("", (), {"problems": problems}))
    monkeypatch.setattr("gpu.build.capability", lambda: 80)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(ConfigTable, "of", classmethod(lambda cls, op: table))
    (table.folder / "candidates.json").write_text(
        json.dumps({"dq": {"80": {"128": [leaf(128), leaf(64)]}}})
    )
    times = [2.0, 1.0, 1.5]
    verdict = tune.run("dq", Deadline(keep=kept.append))
    assert [len(x.content["table"]["rows"]) for x in kept] == [1, 2, 3]
    assert kept[0].line == "1 of 3 configurations timed, 0 refused; nothing written"
    assert verdict.ok and verdict.line.startswith("2 of 3 configurations timed, 1 refused; written")
    assert verdict.content["table"]["rows"][1][2:] == [
        *("1.000", "0.50", f"{MEASURED_STACK + 4} bytes of stack, allowed are {MEASURED_STACK}")
    ]
    configs = json.loads((table.folder / "configs.json").read_text())["dq"]
    assert configs["80"]["128"] == leaf(64, measured=True, card="NVIDIA A100")
    assert configs["86"]["128"] == leaf(32)


def test_the_driver_tells_what_a_kernel_spills(run_python):
    """Compiled for an H100, and loaded by a driver that says 20 words."""
    run_python(
        """
        import sys; sys.path.insert(0, "bench")
        import null_driver, torch
        driver = null_driver.install()
        driver.utils.load_binary = lambda name, kernel, shared, device: (1, name, 32, 20, 1024)
        import extrope_kernels as ek
        from gpu.tune import stack_of_binaries

        assert stack_of_binaries("attention.triton", "one_token") == {}
        q, cache = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16) for n in (1, 32))
        call = {"cache_seqlens": torch.ones(1, dtype=torch.int32), "backend": "triton"}
        freqs = ek.methods.rope(64)
        ek.rope_attention_with_kvcache(q, cache, cache, freqs, ek.scores.rerope(8), **call)
        assert list(stack_of_binaries("attention.triton", "one_token").values()) == [80]
        """,
        TRITON_INTERPRET="0",
        EXTROPE_TRITON_CHIP="90",
    )
