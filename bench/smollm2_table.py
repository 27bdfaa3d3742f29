"""What every method does to SmolLM2 past its length, from what bench/model_runs.py measured.

Texts differ more than methods do, so losses are compared piece by piece with those of YaRN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from extrope_kernels.evaluation.spread import mean_and_error

BASELINE = "yarn"
TWICE, FOUR_TIMES = "smollm2", "smollm2-32k"  # folders, by length
FOLDERS = (TWICE, FOUR_TIMES, "gemma3-270m-48k")
Interval = tuple[float, float | None]  # mean and its standard error


class Measured(NamedTuple):
    """Of a method with some parameters; None where it was not measured."""

    parameters: dict[str, Any]
    loss: float | None = None  # nats a token, behind the training length
    over_yarn: Interval | None = None
    recall: Interval | None = None  # at the longest distance


def measured(results: Path, folder: str = TWICE) -> dict[str, list[Measured]]:
    """By method, what `eval` gives it first, and other parameters as they were tried.

    A method with rounded wavelengths is a row of `resonance`. Of LongRoPE's factors it is told that
    they were searched.
    """
    losses = _losses(results / folder / "loss.json")
    recalls = dict(_rows(results / folder / "recall.json"))
    found: dict[str, list[Measured]] = {}
    for key in dict.fromkeys([*losses, *recalls]):
        method, params = json.loads(key)
        if params.pop("resonance", False):
            method, params = "resonance", {"method": method, **params}
        if method == "longrope":
            params = {"factors": "searched"}
        pieces = losses.get(key)
        farthest = recalls[key]["gains"][-1] if key in recalls else None
        row = Measured(
            params,
            None if pieces is None else fmean(pieces),
            _over(pieces, _baseline(losses)),
            None if farthest is None else (farthest["gain"], farthest["error"]),
        )
        found.setdefault(method, []).append(row)
    return found


def best(rows: list[Measured]) -> Measured:
    """The row of the lowest loss."""
    return min(rows, key=lambda row: float("inf") if row.loss is None else row.loss)


def table_lines(results: Path, folder: str = TWICE) -> list[list[str]]:
    """Cells in Markdown, the lowest loss first."""
    rows = [(name, row) for name, several in measured(results, folder).items() for row in several]
    rows.sort(key=lambda item: item[1].loss or 99)
    return [
        [
            f"`{name}`",
            named(row.parameters),
            "" if row.loss is None else f"{row.loss:.3f}",
            between(row.over_yarn, digits=3),
            between(row.recall),
        ]
        for name, row in rows
    ]


def named(parameters: dict[str, Any]) -> str:
    numbers = {
        name: value if isinstance(value, str) else f"{value:g}"
        for name, value in parameters.items()
    }
    return ", ".join(f"{name}={value}" for name, value in numbers.items())


def between(value: Interval | None, digits: int = 2) -> str:
    """A mean with its standard error."""
    if value is None:
        return ""
    mean, error = value
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            yield json.dumps([row["method"], row["params"]]), row


def _losses(path: Path) -> dict[str, list[float]]:
    """Of each piece, over all buckets behind the training length."""
    if not path.exists():
        return {}
    trained = json.loads(path.read_text())["training_length"]
    found = {}
    for key, row in _rows(path):
        behind = [bucket for bucket in row["buckets"] if bucket["start"] >= trained]
        found[key] = [fmean(pieces) for pieces in zip(*(each["pieces"] for each in behind))]
    return found


def _baseline(losses: dict[str, list[float]]) -> list[float] | None:
    return next((x for key, x in losses.items() if json.loads(key)[0] == BASELINE), None)


def _over(pieces: list[float] | None, baseline: list[float] | None) -> Interval | None:
    if pieces is None or baseline is None:
        return None
    return mean_and_error([a - b for a, b in zip(pieces, baseline, strict=True)])
