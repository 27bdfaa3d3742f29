"""Show results with their standard errors as they come in, and keep them on disk."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from .. import __version__
from .._usage import UsageError

_TELL_EVERY = 5.0  # seconds between lines of progress
_LINE = "{desc}: {percentage:.0f}% of all, {elapsed} so far"
_BAR = "{desc}: {percentage:3.0f}% of all |{bar}| {elapsed}"
_LEFT = ", about {remaining} left"


class Display:
    """A table whose lines come one by one; stderr tells how far all rows are, in a `with` block.

    A terminal gets a bar, anything else a line now and then. It tells how long the rest takes from
    the second part on: the first also loads and warms up.

    total: number of parts.
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        pause = 0.1 if terminal else _TELL_EVERY
        self._stream, self._step, self._until = stream, 0.0, 0.0
        self._bar = tqdm(
            total=total,
            file=sys.stderr if terminal else _Lines(),
            bar_format=_BAR if terminal else _LINE,
            mininterval=pause,
            delay=pause,
            miniters=0,
            smoothing=0,
            leave=False,
            disable=False,
        )

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def line(self, text: str) -> None:
        """Show a line of the table at once."""
        with self._bar.external_write_mode(file=self._stream):
            print(text, file=self._stream, flush=True)

    def begin(self, name: str, ticks: int) -> None:
        """Begin the next part, of so many ticks."""
        if self._until and not self._bar.bar_format.endswith(_LEFT):
            self._bar.bar_format += _LEFT
        self._until = self._bar.n + 1
        self._step = 1 / max(1, ticks)  # 0: layers not found
        self._bar.set_description_str(name, refresh=False)

    def tick(self) -> None:
        """Count a tick of the current part; more than it has count for nothing."""
        self._bar.update(min(self._step, max(0.0, self._until - self._bar.n)))


class _Lines:
    """stderr for a bar that is told in lines: tqdm moves back to write over the last one."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file at once: readers find the old content or the new, never a part.

    So does each of several processes that write it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _as_kept(value: Any) -> Any:
    """Return a value as JSON has it: None for a number that is not finite, lists for tuples."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


class Rows:
    """Measurements in a JSON file, or only in memory: each is made once.

    path: the file; its rows count as made, and those that another process adds meanwhile.
    header: settings that it must have. keys: the entries of a row that tell it from others.

    Raises UsageError if the file is damaged, or has other settings: its rows may have taken hours.
    """

    def __init__(self, path: Path | None, header: dict[str, Any], keys: Sequence[str]) -> None:
        self.path, self._keys = path, keys
        self.results: dict[str, Any] = header | {"rows": []}
        self._known: dict[str, dict[str, Any]] = {}
        self._header = _as_kept(header)
        self._take()

    def known(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of these keys; None if there is none yet."""
        return self._known.get(self._key(row))

    def add(self, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row with its measurement and the seconds that it took, and keep it."""
        began = time.perf_counter()
        found = measure()
        self._take(row | {"seconds": round(time.perf_counter() - began, 3)} | found)
        self.write()
        return self._known[self._key(row)]

    def write(self) -> None:
        """Write the file; a number that is not finite becomes null."""
        if self.path is not None:
            text = json.dumps(_as_kept(self.results), indent=2)
            write_atomic(self.path, text.encode() + b"\n")

    def _take(self, *new: dict[str, Any]) -> None:
        """Take the file's rows, and new ones, as far as there are none of their keys."""
        kept = _read(self.path, self._header) if self.path and self.path.exists() else []
        for row in (*kept, *new):
            if self._known.setdefault(self._key(row), row) is row:
                self.results["rows"].append(row)

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps(_as_kept([row[key] for key in self._keys]), sort_keys=True)


def _read(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
        rows = found.get("rows", [])
        if not isinstance(rows, list):
            raise TypeError("its rows are no list")
    except (OSError, ValueError, TypeError, AttributeError) as error:  # no JSON, or no object
        raise UsageError(
            f"{path} cannot be read ({error}); name another --out, or move it"
        ) from error
    if changed := [name for name, value in header.items() if found.get(name) != value]:
        raise UsageError(
            f"{path} is of other settings ({', '.join(changed)}); name another --out, or move it"
        )
    return rows


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), "extrope_kernels": __version__, **packages}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error: None for one value, or if one is not finite."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None  # statistics would raise its own errors
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def name_of(method: str, params: Mapping[str, Any]) -> str:
    """Name a method with its parameters, without numbers per pair, which would fill a table."""
    shown = {key: value for key, value in params.items() if not isinstance(value, list)}
    numbers = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
    return " ".join([method, *numbers])


def with_error(mean: float | None, error: float | None, digits: int) -> str:
    """Format a cell of a table: 2.471, 2.471±.012, or nan for None."""
    text = f"{math.nan if mean is None else mean:.{digits}f}"
    return text if error is None else f"{text}±{f'{error:.{digits}f}'.removeprefix('0')}"
