"""Measuring, printing and keeping numbers, for all benchmarks.

Times are medians of calls made in turn within one run: a slow phase of the machine hits all alike.
On a GPU a call is captured as a CUDA graph and replayed with a cold L2 cache, so no time includes
Python; on a CPU all reuse memory. Results go to build/bench/PROCESSOR/NAME.json, a row a line;
--record writes them to bench/results/, which the repository keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import re
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

RESULTS = Path(__file__).parent / "results"
BUILD = Path(__file__).parents[1] / "build" / "bench"
NAN = float("nan")
Call = Callable[[], object]
Calls = dict[str, Call | str]  # by name; a string says why one cannot run


# -------------------------------------------------------------------------------------------------
# The machine


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, str | int]:
    """Describe the machine of the numbers, and the day."""
    if device() == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
        amx = " and AMX" if torch.cpu._is_amx_tile_supported() else ""
        name += f", {torch.backends.cpu.get_cpu_capability()}{amx}"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    today = date.today().isoformat()
    return {"device": name, "threads": torch.get_num_threads(), **versions, "date": today}


def folder_of(name: str) -> str:
    """Name the folder of a processor's results: "amx", "avx512", ..., or "gpu-h100-80gb-hbm3"."""
    if "," not in name:
        words = re.findall(r"[a-z0-9]+", name.lower())
        left_out = ("nvidia", "geforce", "graphics", "tesla")
        return "gpu-" + "-".join(word for word in words if word not in left_out)
    return re.split(r", | and ", name)[-1].lower()


def memory() -> int:
    """Return the bytes of the device."""
    if device() == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _malloc(*options: tuple[int, int, int]) -> Iterator[None]:
    """Set options of malloc: (option, value, value afterwards) each."""
    mallopt = ctypes.CDLL(None).mallopt
    for option, value, _ in options:
        mallopt(option, value)
    try:
        yield
    finally:
        for option, _, after in options:
            mallopt(option, after)


TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4


def kept_memory() -> contextlib.AbstractContextManager[None]:
    """Let malloc keep freed memory, as jemalloc and other caching allocators do.

    By default glibc returns blocks past 32 MiB to the system, and every large output costs page
    faults again; a PyTorch set up for speed on CPUs does not pay them.
    """
    return _malloc((TRIM_THRESHOLD, 2**31 - 1, 128 * 1024), (MMAP_MAX, 0, 65536))


def returned_memory() -> contextlib.AbstractContextManager[None]:
    """Let malloc return every freed tensor at once, so that a peak counts only memory in use."""
    return _malloc((MMAP_THRESHOLD, 128 * 1024, 32 * 2**20))


# -------------------------------------------------------------------------------------------------
# Timing


def clock(function: Call) -> Callable[[], float]:
    """Return a function that calls once and gives the milliseconds."""
    return _replayed(function) if device() == "cuda" else functools.partial(_wall_time, function)


def _wall_time(function: Call) -> float:
    """Stop the clock before the result is freed."""
    start = time.perf_counter()
    kept = function()
    milliseconds = (time.perf_counter() - start) * 1e3
    del kept
    return milliseconds


def _replayed(function: Call) -> Callable[[], float]:
    """Capture the call as a CUDA graph. Raises if the call waits for the GPU."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(3):  # compile before the capture
            function()
    main.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The outer stream: a failed capture leaves its own stream the current one.
    with torch.cuda.stream(main), torch.cuda.graph(graph):
        function()

    def milliseconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_l2().zero_()  # it keeps the GPU busy while the host queues the rest
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


@functools.cache
def _larger_than_l2() -> torch.Tensor:
    return torch.empty(2**30, dtype=torch.uint8, device="cuda")


def paired(*functions: Call, repeats: int = 15, seconds: float = math.inf) -> list[float]:
    """Return the median milliseconds of each, round by round; past `seconds` at least four rounds.

    Every other round runs backward: otherwise a function after one that fills the caches would pay
    for it every time, 4% of a rotation. An untimed call precedes each timed one, so that its
    allocations do not depend on the memory that the function before it has freed.
    """
    clocks = [clock(function) for function in functions]
    once_each = 2 * sum([milliseconds() for milliseconds in clocks])
    repeats = max(min(repeats, 4), min(repeats, int(min(seconds * 1e3 / once_each, 1e9))))
    times: list[list[float]] = [[] for _ in clocks]
    for round_ in range(repeats):
        each = list(zip(times, clocks))
        for of_one, milliseconds in each[::-1] if round_ % 2 else each:
            milliseconds()
            of_one.append(milliseconds())
    return [statistics.median(of_one) for of_one in times]


def host_microseconds(function: Call, calls: int = 1000, rounds: int = 60) -> float:
    """Return the microseconds that one call keeps Python busy: the best of several rounds."""
    idle = torch.cuda.synchronize if device() == "cuda" else "pass"
    return min(timeit.repeat(function, idle, number=calls, repeat=rounds)) / calls * 1e6


def peak_megabytes(function: Call) -> float:
    """Return the rise of memory above that held before the call."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        peak = torch.cuda.max_memory_allocated
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present memory
        peak = _peak_of_this_process
    before = peak()
    function()
    return (peak() - before) / 1e6


def _peak_of_this_process() -> int:
    return 1000 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# -------------------------------------------------------------------------------------------------
# Rows and tables


def column(head: str = "", form: str = "", default: object = MISSING):
    """Return a field of a row that tables show, with its heading and its format."""
    return field(default=default, metadata={"head": head, "form": form})


def columns(row: object) -> dict[str, tuple[str, str]]:
    """Return heading and format of the shown fields of a row, or of its class; the verdict last."""
    shown = [x for x in fields(row) if x.metadata]
    found = {x.name: (x.metadata["head"], x.metadata["form"]) for x in shown}
    return found | ({"verdict": ("", "")} if hasattr(row, "verdict") else {})


@dataclass
class Row:
    """One implementation of one case; NaN if not measured."""

    case: str = column()
    implementation: str = column()
    dtype: str = column("dtype")
    shape: str = column("shape")
    backend: str = column("backend", default="")
    milliseconds: float = column("ms", ".2f", NAN)
    of_floor: float = column("floor/it", ".2f", NAN)  # the floor's time over this one's
    ratio: float = column("ours/it", ".3f", NAN)  # our time over this one's: below 1 we are faster
    bar: float = column("bar", ".3g", NAN)  # the ratio may be no larger
    error: float = column("error", ".1e", NAN)  # the largest difference to float64
    host_microseconds: float = column("host us", ".1f", NAN)  # of a call on one token
    megabytes: float = column("peak MB", ".0f", NAN)  # above the memory held before the call
    absent: str = ""  # why it was not measured

    @property
    def verdict(self) -> str:
        return verdict(self.ratio, self.bar)


def verdict(value: float, bar: float) -> str:
    if math.isnan(bar) or math.isnan(value):
        return ""
    return "met" if value <= bar else "missed"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cell(value: object, form: str = "") -> str:
    """Format one cell of a table; empty if not measured."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else format(value, form)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Make a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


# -------------------------------------------------------------------------------------------------
# The run


def arguments(description: str, argv: list[str] | None = None, scores: Sequence[str] = ()) -> Any:
    """Parse the options of every benchmark, and --score where it has score methods."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="paired runs of each case")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases named so")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, help="folder; default build/bench/PROCESSOR")
    parser.add_argument("--record", action="store_true", help="write to bench/results/PROCESSOR")
    if scores:
        parser.add_argument("--score", action="append", choices=scores, help="default: three")
    args = parser.parse_args(argv)
    # Past 8 dtypes, sizes and modes of one function torch.compile gives up, and runs it eagerly.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if args.quick:
        args.repeats = 1
        torch._dynamo.config.disable = True  # compiling takes longer than everything else here
    elif args.out is None:
        args.out = results_of(args.record)
    return args


def results_of(record: bool) -> Path:
    """Return the folder of this machine's results; record: the one that the repository keeps."""
    return (RESULTS if record else BUILD) / folder_of(str(machine()["device"]))


class Report:
    """Rows, printed as they are measured, kept and saved. Inputs drawn after it are the same."""

    def __init__(self, name: str, args: Any, **about: object):
        self.name, self.args, self.about = name, args, about
        self.is_part = bool(args.only or getattr(args, "score", None))
        self.rows: list = []
        if self.is_part and args.record and args.out:
            check_same_run(args.out / f"{name}.json")
        torch.manual_seed(0)
        print(" ".join(f"{key}: {value}" for key, value in {**machine(), **about}.items()))
        if device() == "cpu" and not args.quick:
            # A virtual machine's host backs a page at its first write, which must not be timed.
            torch.empty(3 << 30, dtype=torch.uint8).fill_(1)

    def wants(self, case: str, dtype: torch.dtype | None = None) -> bool:
        """Return True if --only selects this case."""
        name = case if dtype is None else f"{case} {name_of(dtype)}"
        return not self.args.only or any(text in name for text in self.args.only)

    def add(self, row) -> None:
        self.rows.append(row)
        words = []
        for name, (head, form) in columns(row).items():
            value = getattr(row, name)
            if text := cell(value, form):
                words.append(text if isinstance(value, str) else f"{head} {text}")
        print(" | ".join(words), getattr(row, "absent", ""), flush=True)
        if self.is_part:  # time may be up before the next
            self.save()

    def save(self) -> None:
        """Save: a whole run replaces the file, a part (--only, --score) its own rows."""
        if self.args.out is not None and self.rows:
            save(self.name, self.rows, self.args.out, self.is_part, **self.about)


def check_same_run(path: Path) -> None:
    """Exit if rows of today and of this machine would stand under the header of others."""
    if path.exists() and (before := json.loads(path.read_text())["machine"]) != machine():
        raise SystemExit(
            f"{path}: is of {before['device']}, {before.get('date', 'no date')}: a part cannot "
            "join it; leave --record out, or measure all of it"
        )


def save(name: str, rows: list, folder: Path, merge: bool = False, **more: object) -> Path:
    """Write NAME.json. merge: keep other rows of the same machine and day."""
    path = folder / f"{name}.json"
    before = json.loads(path.read_text()) if merge and path.exists() else {}
    every = before["rows"] if before.get("machine") == machine() else []
    for row in rows:
        values = {**asdict(row), "verdict": getattr(row, "verdict", "")}
        # JSON has no NaN: what was not measured is left out.
        every.append({key: value for key, value in values.items() if cell(value) != ""})
    measured = {}
    for row in every:  # words and whole numbers name a row, but for the outcome
        named = {key: x for key, x in row.items() if isinstance(x, (str, int))}
        measured[json.dumps(named | {"verdict": "", "absent": ""}, sort_keys=True)] = row
    write(path, {"machine": machine(), **more, "rows": list(measured.values())})
    return path


def write(path: Path, content: dict) -> None:
    """Write JSON with a row a line, and numbers of six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {key: value for key, value in content.items() if key != "rows"}
    head = json.dumps(short({**about, "rows": []}), indent=1, ensure_ascii=False)
    lines = ",\n".join(json.dumps(short(row), ensure_ascii=False) for row in content["rows"])
    path.write_text(head.removesuffix("[]\n}") + f"[\n{lines}\n]}}\n")


def short(value):
    """Round all numbers to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {key: short(x) for key, x in value.items()}
    return [short(x) for x in value] if isinstance(value, (list, tuple)) else value
