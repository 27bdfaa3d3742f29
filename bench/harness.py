"""How every benchmark measures, prints and keeps its numbers.

Times are medians of calls made in turn within one run, so that a slow spell of the machine hits all
alike. A peer is paired with ours alone: memory that a third one frees would change what the next
allocation costs. On a GPU a call is captured as a CUDA graph, so that Python is in no time, and the
replays are timed, each with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._dynamo
from machine import back_memory, device, machine, return_memory
from replay import replayed

RESULTS = Path(__file__).parent / "results"
NAN = float("nan")
Call = Callable[[], object]


@dataclass
class Row:
    """One implementation of one case; NaN is what the case does not measure."""

    case: str
    implementation: str
    dtype: str
    shape: str
    backend: str = ""
    milliseconds: float = NAN
    of_floor: float = NAN  # the floor's time over this one's
    ratio: float = NAN  # our time over this one's: below 1 we are faster
    bar: float = NAN  # what the ratio has to stay under
    error: float = NAN  # the largest difference to float64
    host_microseconds: float = NAN  # of a call on one token
    megabytes: float = NAN  # peak above what was held before the call
    absent: str = ""  # why it was not measured

    @property
    def verdict(self) -> str:
        return verdict(self.ratio, self.bar)


def verdict(value: float, bar: float) -> str:
    if math.isnan(bar) or math.isnan(value):
        return ""
    return "met" if value <= bar else "missed"


# Field of a row: its heading, the width of its column, its format.
COLUMNS = {
    "case": ("", 31, ""),
    "implementation": ("", 40, ""),
    "dtype": ("dtype", 8, ""),
    "shape": ("shape", 22, ""),
    "backend": ("backend", 7, ""),
    "milliseconds": ("ms", 9, ".2f"),
    "of_floor": ("floor/it", 8, ".2f"),
    "ratio": ("ours/it", 7, ".3f"),
    "bar": ("bar", 5, ".3g"),
    "verdict": ("", 6, ""),
    "error": ("error", 8, ".1e"),
    "host_microseconds": ("host us", 8, ".1f"),
    "megabytes": ("peak MB", 8, ".0f"),
}


def cell(value: object, form: str = "") -> str:
    """One number or word of a table; nothing for what was not measured."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else format(value, form)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -------------------------------------------------------------------------------------------------
# Timing


def clock(function: Call) -> Callable[[], float]:
    """What takes the milliseconds of one call, as often as asked."""
    return replayed(function) if device() == "cuda" else functools.partial(_wall_time, function)


def once(function: Call) -> float:
    """Milliseconds of one call."""
    return clock(function)()


def _wall_time(function: Call) -> float:
    """What the call returns is freed after the clock has stopped."""
    start = time.perf_counter()
    kept = function()
    milliseconds = (time.perf_counter() - start) * 1e3
    del kept
    return milliseconds


def paired(*functions: Call, repeats: int = 15, seconds: float = math.inf) -> list[float]:
    """Median milliseconds of each, round by round; fewer repeats, but four, past `seconds`.

    Every other round goes backward: a function behind one that fills the caches would otherwise
    pay for it every time, 4% of a rotation. An untimed call goes before each timed one: what that
    allocates must not depend on what the function measured before has freed.
    """
    clocks = [clock(function) for function in functions]
    once_each = 2 * sum([milliseconds() for milliseconds in clocks])
    repeats = max(min(repeats, 4), min(repeats, int(min(seconds * 1e3 / once_each, 1e9))))
    times: list[list[float]] = [[] for _ in clocks]
    for round_ in range(repeats):
        each = list(zip(times, clocks))
        for of_one, one in each[::-1] if round_ % 2 else each:
            of_one.append(_settled(one))
    return [statistics.median(of_one) for of_one in times]


def _settled(milliseconds: Callable[[], float]) -> float:
    milliseconds()
    return milliseconds()


def host_microseconds(function: Call, calls: int = 1000, rounds: int = 60) -> float:
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


def peak_megabytes(function: Call) -> float:
    """How far memory rises above what is held before the call."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _status("VmHWM")
    function()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """Kilobytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="paired runs of each case")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases with TEXT in their name and dtype",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, help="folder for the results, default bench/results")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
        torch._dynamo.config.disable = True  # compiling takes longer than everything else here
    elif args.out is None:
        args.out = RESULTS
    return args


class Report:
    """Prints each row as soon as it is measured; keeps and saves them."""

    def __init__(self, name: str, args: argparse.Namespace, columns=COLUMNS, **about: object):
        self.name, self.args, self.columns, self.about = name, args, columns, about
        self.rows: list = []
        print(" ".join(f"{key}: {value}" for key, value in {**machine(), **about}.items()))
        print(" ".join(f"{head:{width}}" for head, width, _ in columns.values()))
        if not args.quick:
            back_memory()

    def wants(self, case: str) -> bool:
        """Whether --only selects this case."""
        return not self.args.only or any(text in case for text in self.args.only)

    def add(self, row) -> None:
        self.rows.append(row)
        words = []
        for field, (_, width, form) in self.columns.items():
            value = getattr(row, field)
            words.append(f"{cell(value, form):{'<' if isinstance(value, str) else '>'}{width}}")
        print(" ".join(words).rstrip(), getattr(row, "absent", ""), flush=True)

    def save(self) -> None:
        """A whole run replaces what was there; a part (--only) replaces its own rows."""
        if self.args.out is not None and self.rows:
            merge = bool(self.args.only)
            print(f"written: {save(self.name, self.rows, self.args.out, merge, **self.about)}")


def save(
    name: str, rows: list, folder: Path = RESULTS, merge: bool = False, **more: object
) -> Path:
    """Write NAME-DEVICE.json and return its path.

    merge: keep the rows that are there and that were not measured again, if on the same machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device()}.json"
    measured = {_identity(row): row for row in map(_plain, rows)}
    if merge and path.exists():
        before = json.loads(path.read_text())
        if before["machine"] == machine():
            measured = {_identity(row): row for row in before["rows"]} | measured
    content = {"machine": machine(), **more, "rows": list(measured.values())}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _plain(row) -> dict:
    """JSON has no NaN, which stands for what a case does not measure."""
    values = {**asdict(row), "verdict": getattr(row, "verdict", "")}
    return {name: value for name, value in values.items() if cell(value) != ""}


def _identity(row: dict) -> tuple:
    """What names a row: its words and whole numbers, but for the outcome."""
    return tuple(
        (name, value)
        for name, value in row.items()
        if isinstance(value, (str, int)) and name not in ("verdict", "absent")
    )
