"""Timing by pairs in one run, the copy floor, and where results go: shared by every benchmark."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measured case. Times in milliseconds; ratios are ours / the other's in the same run."""

    case: str
    dtype: str
    layout: str
    milliseconds: float
    against: str
    ratio: float
    percent_of_copy: float
    error: float
    host_microseconds: float


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    if device() == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


def once(function: Callable[[], object]) -> float:
    """Milliseconds of one call; on a GPU with a cold L2 cache, by events."""
    if device() == "cpu":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    _flush_l2()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


_scratch: list[Tensor] = []


def _flush_l2() -> None:
    if not _scratch:
        _scratch.append(torch.empty(2**28, dtype=torch.uint8, device="cuda"))
    _scratch[0].zero_()


def paired(*functions: Callable[[], object], repeats: int = 15) -> list[float]:
    """Median milliseconds of each, measured in turn: a slow spell of the machine hits all alike."""
    for function in functions:
        once(function)
    times = [[once(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def host_microseconds(function: Callable[[], object], calls: int = 1000, rounds: int = 60) -> float:
    """Microseconds that one call keeps Python busy: the best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - start) / calls)
        if device() == "cuda":
            torch.cuda.synchronize()
    return best * 1e6


def peak_megabytes(function: Callable[[], object]) -> float:
    """How far memory rises above what is held before the call."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _status("VmHWM")
    function()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """Kilobytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def largest_error(out: Tensor, exact: Tensor) -> float:
    return (out.double() - exact).abs().max().item()


def _or_null(value: object) -> object:
    """JSON has no NaN, which stands for what a case does not measure."""
    return None if isinstance(value, float) and math.isnan(value) else value


def save(name: str, rows: list, **more: object) -> Path:
    """Write bench/results/NAME-DEVICE.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device()}.json"
    measured = [{name: _or_null(x) for name, x in asdict(row).items()} for row in rows]
    content = {"machine": machine(), **more, "rows": measured}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
