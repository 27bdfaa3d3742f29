"""Show results with their standard errors as they come in, and keep them on disk."""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from .. import __version__
from . import UsageError

_TELL_EVERY = 30.0  # seconds between lines of progress
_LINE = "{desc}: {percentage:.0f}% of all, {elapsed} so far, about {remaining} left"
_BAR = "{desc}: {percentage:3.0f}% of all |{bar}| {elapsed}, about {remaining} left"


class Display:
    """A table whose lines come one by one; stderr tells how far all rows are, in a `with` block.

    A terminal gets a bar, anything else a line now and then.
    """

    def __init__(self, stream: TextIO, rows: int) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        pause = 0.1 if terminal else _TELL_EVERY
        self._stream, self._ticks = stream, 1
        self._bar = tqdm(
            total=rows,
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
        """Begin the next row, which has this many ticks."""
        self._ticks = ticks
        self._bar.set_description_str(name, refresh=False)

    def tick(self, ticks: int = 1) -> None:
        """Count ticks of the current row as done."""
        self._bar.update(ticks / self._ticks)


class _Lines:
    """stderr for a bar that is told in lines: tqdm moves back to write over the last one."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file at once: readers find the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON; a number that is not finite becomes null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def resumed(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Return the header with the rows that a file of results already holds.

    Raises UsageError if the file is damaged, or has other settings: its rows may have taken hours.
    """
    if not path.exists():
        return header
    try:
        found = json.loads(path.read_text())
        rows = found.pop("rows", [])
        if not isinstance(rows, list):
            raise TypeError("its rows are no list")
    except (OSError, ValueError, TypeError, AttributeError) as error:  # no JSON, or no object
        raise UsageError(
            f"{path} cannot be read ({error}); name another --out, or move it"
        ) from error
    plain = json.loads(json.dumps({name: x for name, x in header.items() if name != "rows"}))
    if changed := [name for name, x in plain.items() if found.get(name) != x]:
        raise UsageError(
            f"{path} is of other settings ({', '.join(changed)}); name another --out, or move it"
        )
    return header | {"rows": rows}


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {
        "python": platform.python_version(),
        "extrope_kernels": __version__,
        **packages,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error: None for one value, or if one is not finite."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None  # statistics would raise its own errors
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def with_error(mean: float | None, error: float | None, digits: int) -> str:
    """Format a cell of a table: 2.471, 2.471±.012, or nan for None."""
    text = f"{math.nan if mean is None else mean:.{digits}f}"
    return text if error is None else f"{text}±{f'{error:.{digits}f}'.removeprefix('0')}"
