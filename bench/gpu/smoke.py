"""One launch of every kernel, against the reference: python -m gpu.smoke SECONDS runs them alone.

Forward, backward and with a cache, by every backend that runs here: see checks.py. Which kernels
that launched is read from the profiler: one that was not fails the step.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from extrope_kernels import _ext

from .step import ROOT, Deadline, Verdict


def kernels() -> set[str]:
    """The names of all GPU kernels that are there, from their sources."""
    python = (path.read_text() for path in (ROOT / "extrope_kernels").rglob("triton/*.py"))
    found = {name for text in python for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    if _ext.load("cuda") is not None:  # `gpu build` says why
        return found
    cuda = (path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.*") if path.is_file())
    return found | {
        name for text in cuda for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text)
    }


def error_of(check: Callable[[], None]) -> str:
    """What a check finds wrong, in a line; nothing where all is right."""
    try:
        check()
    except Exception as error:  # whatever a first launch on a card can raise
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]


def run(deadline: Deadline) -> Verdict:
    from .checks import checks

    every, errors, ran = list(checks()), [], 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for name, check in every:
            if not deadline:
                break
            error = error_of(check)
            ran += 1
            print(f"{name}: {error or 'ok'}", flush=True)
            errors += [f"{name}: {error}"] if error else []
            if is_lost():
                break
    launched = {event.key for event in seen.key_averages()}
    return verdict(len(every), ran, errors, never_launched(launched))


def is_lost() -> bool:
    """After a bad access every later call fails: nothing more can be told in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the CUDA context is lost: {_first_line(error)}", flush=True)
        return True
    return False


def never_launched(launched: set[str]) -> list[str] | None:
    """The kernels whose name is in no launch; None where the profiler saw nothing at all."""
    if not any("kernel" in name for name in launched):
        return None
    words = {word for name in launched for word in re.findall(r"\w+_kernel", name)}
    return sorted(kernels() - words)


def verdict(cases: int, ran: int, errors: list[str], missed: list[str] | None) -> Verdict:
    line = f"{ran - len(errors)} of {cases} checks passed, {len(errors)} failed"
    if ran < cases:
        line += f", {cases - ran} not run"
    if missed is None:
        line += "; the profiler saw no kernels, so which were launched is not known"
    elif missed:
        line += f"; never launched: {', '.join(missed)}"
    else:
        line += "; every kernel was launched"
    content = {"errors": errors, "never_launched": missed}
    return Verdict(ran == cases and not errors and not missed, line, content)


def alone() -> list[tuple[str, str]]:
    """(operation, backend): enough to launch every kernel."""
    from operations import everywhere

    variants = ("leaky rerope", "self-extend", "blockwise causal")
    found = [(name, backend) for name, backend in everywhere() if backend != "reference"]
    return [(name, backend) for name, backend in found if not name.startswith(variants)]


def main() -> None:
    """Every operation once on the GPU, with nothing to compare to: for compute-sanitizer."""
    from operations import OPERATIONS

    deadline, every = Deadline(float(sys.argv[1])), alone()
    for index, (name, backend) in enumerate(every):
        if not deadline:
            break
        OPERATIONS[name].run(backend, **OPERATIONS[name].inputs(torch.bfloat16))
        torch.cuda.synchronize()
        print(f"ran {index + 1} of {len(every)}: {name}, {backend}", flush=True)


if __name__ == "__main__":
    main()
