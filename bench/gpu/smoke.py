"""Launch every kernel, and compare with the reference: python -m gpu.smoke SECONDS only launches.

Forward, backward and with a cache, by every backend that runs here: see checks.py. The profiler
tells each check's launches: a kernel that its check did not launch fails the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from extrope_kernels.testing import available_backends

from . import launches
from .step import Deadline, Verdict


def error_of(check: Callable[[], None]) -> str:
    """Return a check's error in a line; "" if all is right."""
    try:
        check()
    except Exception as error:  # a first launch on a card may raise anything
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]


def run(deadline: Deadline) -> Verdict:
    from .checks import checks

    every, errors, ran = list(checks()), [], 0
    seen: dict[launches.Source, set[str]] = {}
    for name, check in every:
        if not deadline:
            break
        error, lost, launched = watched(check)
        seen.setdefault(launches.source_of(name), set()).update(launched)
        ran += 1
        print(f"{name}: {error or 'ok'}", flush=True)
        errors += [f"{name}: {error}"] if error else []
        if lost:
            break
    return verdict(len(every), ran, errors, launches.never_launched(seen, available_backends()))


def watched(check: Callable[[], None]) -> tuple[str, bool, set[str]]:
    """Return a check's error, whether the context is lost, and the names of its launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        error, lost = error_of(check), is_lost()
    return error, lost, {event.key for event in seen.key_averages()}


def is_lost() -> bool:
    """Return True after a bad access: every later call in this process fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the CUDA context is lost: {_first_line(error)}", flush=True)
        return True
    return False


def verdict(
    cases: int, ran: int, errors: list[str], missed: list[launches.Kernel] | None
) -> Verdict:
    line = f"{ran - len(errors)} of {cases} checks passed, {len(errors)} failed"
    if ran < cases:
        line += f", {cases - ran} not run"
    if missed is None:
        line += "; the profiler saw no kernels, so which were launched is not known"
    elif missed:
        line += f"; never launched: {', '.join(map(str, missed))}"
    else:
        line += "; every kernel was launched"
    names = None if missed is None else [str(kernel) for kernel in missed]
    content = {"errors": errors, "never_launched": names}
    return Verdict(ran == cases > 0 and not errors and not missed, line, content)


def alone() -> list[tuple[str, str]]:
    """List (operation, backend) pairs that launch every kernel."""
    from operations import everywhere

    variants = ("leaky rerope", "self-extend", "blockwise causal")
    found = [(name, backend) for name, backend in everywhere() if backend != "reference"]
    return [(name, backend) for name, backend in found if not name.startswith(variants)]


def main() -> None:
    """Run every operation once on the GPU without a comparison, for compute-sanitizer."""
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
