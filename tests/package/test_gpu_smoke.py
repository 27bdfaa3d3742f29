"""What `make gpu` launches, by each check, and the sanitizer: told without a GPU."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu import launches, sanitizer, smoke
from gpu.launches import Kernel, Source
from gpu.step import Deadline

from extrope_kernels.testing import available_backends

ROOT = Path(__file__).parents[2]


def test_every_kernel_is_asked_for():
    """By its backend and op: names alone are not unique."""
    sources = (ROOT / "extrope_kernels" / "ops").rglob("triton/*.py")
    found = {
        Kernel("triton", path.parent.parent.name, name)
        for path in sources
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert found == {kernel for kernel in launches.OPERATIONS if kernel.backend == "triton"}
    cuda = ROOT / "csrc" / "cuda"
    asked = [kernel for kernel in launches.OPERATIONS if kernel.backend == "cuda"]
    texts = [path.read_text() for path in cuda.rglob("*") if path.suffix in (".h", ".cu")]
    names = {name for x in texts for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", x)}
    assert {kernel.name for kernel in asked} == names
    ops = {path.parent.name for path in cuda.rglob("bind.cpp")} - {"runtime"}
    assert {kernel.op for kernel in asked} == ops


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
        triton = {kernel for kernel in launches.OPERATIONS if kernel.backend == "triton"}

        for name, backend in smoke.alone():
            if backend == "triton":
                one = operations.OPERATIONS[name]
                one.run(backend, **one.inputs(torch.bfloat16))
        assert launched == triton

        seen = {}
        for name, check in checks.checks():
            launched.clear()
            source = launches.source_of(name)
            if source.backend == "triton":
                smoke.error_of(check)
            seen[source] = set(launched)
        for kernel, operation in launches.OPERATIONS.items():
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
    # Triton in the place of CUDA C++, and a longer name.
    rope = Kernel("cuda", "permute", "permute_kernel")
    assert not rope.is_seen_as("permute_kernel") and rope.is_seen_as("_Z14permute_kernelIf")
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
    every["norm, rope and append", "cuda"] = {"permute_kernel"}
    verdict = smoke.run(Deadline())
    assert verdict.line.endswith("never launched: append's norm_forward_kernel (cuda)")
    assert verdict.content["never_launched"] == ["append's norm_forward_kernel (cuda)"]


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


def test_a_missing_sanitizer_is_told(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    verdict = sanitizer.memcheck(Deadline())
    assert verdict.line == "compute-sanitizer is not installed: nothing was checked"
