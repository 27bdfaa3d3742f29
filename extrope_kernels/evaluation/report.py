"""Show results with their standard errors as they come in, and keep them on disk."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from .. import __version__
from . import UsageError

_TELL_EVERY = 30.0  # seconds between lines of progress


class Display:
    """A table whose lines come one by one; a terminal also shows progress bars: row, all rows."""

    def __init__(self, stream: TextIO, rows: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._stream = stream
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            transient=True,
            disable=not stream.isatty(),
        )
        self._all = self.bars.add_task("all rows", total=rows)
        self._row = self.bars.add_task("", total=1, visible=False)
        self._ticks = 1
        self._began = time.monotonic()

    def line(self, text: str) -> None:
        """Show a line of the table at once."""
        if self.bars.disable:
            print(text, file=self._stream, flush=True)
        else:
            self.bars.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def begin(self, name: str, ticks: int) -> None:
        """Begin the next row, which has this many ticks."""
        self._ticks = ticks
        self.bars.reset(self._row, total=ticks, description=name, visible=True)

    def tick(self, ticks: int = 1) -> None:
        """Count ticks of the current row as done."""
        self.bars.advance(self._row, ticks)
        self.bars.advance(self._all, ticks / self._ticks)

    def progress(self) -> str:
        """Return a line of progress: the current row, the share done, the time left."""
        every, row = self.bars.tasks
        told = "; ".join(f"{bar.description}: {bar.percentage:.0f}%" for bar in (row, every))
        if not every.completed:
            return told
        left = (time.monotonic() - self._began) * (every.total / every.completed - 1)
        return f"{told}, about {clock(left)} left"


@contextmanager
def open_display(stream: TextIO, rows: int) -> Iterator[Display]:
    """Show a table of `rows` rows; progress goes to stderr if the stream is no terminal."""
    display = Display(stream, rows)
    with display.bars, telling(display.progress) if display.bars.disable else nullcontext():
        yield display


@contextmanager
def telling(progress: Callable[[], str]) -> Iterator[None]:
    """Print a line of progress on stderr now and then while the block runs."""
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(_TELL_EVERY):
            so_far = clock(time.monotonic() - began)
            print(f"{progress()}, {so_far} so far", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds: 7:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file at once: readers find the old content or the new, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON; a number that is not finite becomes null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def resumed(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Return the header with the rows that a file of results already holds.

    Numbers that were not finite come back as NaN.

    Raises UsageError if the file is damaged, or has other settings: its rows may have taken hours.
    """
    if not path.exists():
        return header
    found = _read_results(path)
    rows = found.pop("rows", [])
    plain = json.loads(json.dumps({name: x for name, x in header.items() if name != "rows"}))
    changed = [name for name, x in plain.items() if found.get(name) != x]
    if changed:
        raise UsageError(
            f"{path} is of other settings ({', '.join(changed)}); name another --out, or move it"
        )
    return header | {"rows": _with_nan(rows)}


def _read_results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not (isinstance(found, dict) and isinstance(found.get("rows", []), list)):
            raise ValueError("no results")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise UsageError(
            f"{path} cannot be read ({error}); name another --out, or move it"
        ) from error
    return found


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {
        "python": platform.python_version(),
        "extrope_kernels": __version__,
        **packages,
    }


def format_line(method: str, length: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of the table: method, length and the cells, right-aligned."""
    padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
    return f"{method:<12} {length:>6} " + " ".join(padded)


def range_label(start: int, stop: int) -> str:
    """Return a range of positions for a column head: 2-4k, or 512-768."""
    if start % 1024 == 0 and stop % 1024 == 0:
        return f"{start // 1024}-{stop // 1024}k"
    return f"{start}-{stop}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _with_nan(value: Any) -> Any:
    """Undo `_finite`: a measurement that is None becomes NaN. Any other None stays."""
    if isinstance(value, dict):
        kept = ("error", "of", "params")
        return {key: item if key in kept else _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return float("nan") if value is None else value


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error: None for one value, or if one is not finite."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None  # statistics would raise its own errors
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def with_error(mean: float, error: float | None, digits: int) -> str:
    """Format a cell of a table: 2.471, or 2.471±.012."""
    text = f"{mean:.{digits}f}"
    return text if error is None else f"{text}±{f'{error:.{digits}f}'.removeprefix('0')}"
