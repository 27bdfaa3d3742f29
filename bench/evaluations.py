"""Evaluations of real models for the docs: bench/results/models/NAME.json, a row a line.

`eval` writes every measurement; rows here keep only the numbers of tables and plots.
Losses are kept by piece of text: texts differ more than methods, so methods are compared with YaRN
piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from harness import RESULTS, short, write

from extrope_kernels.evaluation.report import mean_and_error

FOLDER = "models"
Interval = tuple[float, float | None]  # mean and its standard error
Row = dict[str, Any]


# -------------------------------------------------------------------------------------------------
# Keep


def loss_row(row: Row, trained: int) -> Row:
    """Return the mean loss of each piece, before the training length and past it."""
    parts: dict[str, list] = {"near": [], "far": []}
    for bucket in row["buckets"]:
        parts["far" if bucket["start"] >= trained else "near"].append(bucket["pieces"])
    return {key: [fmean(each) for each in zip(*pieces)] for key, pieces in parts.items()}


KEPT: dict[str, Callable[[Row, int], Row]] = {
    "loss": loss_row,
    # The gain at the longest distance, with its standard error.
    "recall": lambda row, _: {"recall": [row["gains"][-1]["gain"], row["gains"][-1]["error"]]},
    "gains": lambda row, _: {"gains": [[gain["gain"], gain["error"]] for gain in row["gains"]]},
    "demo": lambda row, _: {
        "seconds": row["seconds"], "losses": [bucket["loss"] for bucket in row["buckets"]]
    },
    # Likewise, and the loss of each text in each bucket of positions.
    "by_position": lambda row, trained: loss_row(row, trained)
    | {"positions": [bucket["pieces"] for bucket in row["buckets"]]},
    # The mean loss of a text within the training length.
    "short": lambda row, _: {"length": row["length"], "loss": row["loss"]},
}  # fmt: skip
ABOUT = ("model", "training_length", "dtype", "threads", "bucket", "distances", "texts")


def keep(found: Path, name: str, kind: str, results: Path = RESULTS) -> None:
    """Add what `eval` wrote to models/NAME.json; rows of the same parameters become one.

    Raises ValueError if the file's rows are of other texts: rows are compared piece by piece.
    """
    new, path = compact(json.loads(found.read_text()), kind), results / FOLDER / f"{name}.json"
    content, texts = read(name, results), new["texts"]
    kept = content.get("texts", texts)
    if len(kept) != len(texts) or any(a.items() - b.items() for a, b in zip(kept, texts)):
        raise ValueError(f"{path} is of other texts than {found}: {kept}, not {texts}")
    rows: dict[str, Row] = {}
    for row in (*content["rows"], *new["rows"]):
        # A short text has a row for each length.
        key = json.dumps(short([row["method"], row["params"], row.get("length")]))
        rows[key] = rows.get(key, {}) | row
    write(path, {**content, **new, "rows": list(rows.values())})


def compact(measured: Row, kind: str) -> Row:
    """Return what `eval` measured, with the numbers of tables and plots alone."""
    trained = measured["training_length"]
    rows = [{"method": row["method"], "params": row["params"], **KEPT[kind](row, trained)}
            for row in measured["rows"]]  # fmt: skip
    return {key: measured[key] for key in ABOUT if key in measured} | {"rows": rows}


# -------------------------------------------------------------------------------------------------
# Read


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """Return the content kept under a name; no rows if there is none."""
    path = results / FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


class Measured(NamedTuple):
    """Measurements of a method with some parameters; None if not measured."""

    parameters: dict[str, Any]
    loss: float | None = None  # nats a token, behind the training length
    over_yarn: Interval | None = None
    recall: Interval | None = None  # at the longest distance


def measured(results: Path = RESULTS, name: str = "smollm2-16k") -> dict[str, list[Measured]]:
    """Return measurements by method: first `eval`'s parameters, then others that were tried.

    A method with rounded wavelengths is a row of `resonance`.
    """
    rows = read(name, results)["rows"]
    yarn = next((row["far"] for row in rows if row["method"] == "yarn" and "far" in row), None)
    found: dict[str, list[Measured]] = {}
    for row in rows:
        method, params, far = row["method"], dict(row["params"]), row.get("far")
        if params.pop("resonance", False):
            method, params = "resonance", {"method": method, **params}
        one = Measured(params, recall=tuple(row["recall"]) if "recall" in row else None)
        if far is not None:
            over = [a - b for a, b in zip(far, yarn, strict=True)] if yarn else []
            one = one._replace(loss=fmean(far), over_yarn=mean_and_error(over) if over else None)
        found.setdefault(method, []).append(one)
    return found


def best(rows: list[Measured]) -> Measured:
    """Return the row of the lowest loss."""
    return min(rows, key=lambda row: float("inf") if row.loss is None else row.loss)


def named(parameters: dict[str, Any]) -> str:
    """Write parameters; many numbers of all pairs of dims by their ends."""
    words = []
    for key, value in parameters.items():
        few = value if isinstance(value, list) else [value]
        between = " " if len(few) <= 8 else " to "
        few = few if len(few) <= 8 else [few[0], few[-1]]
        words.append(f"{key}={between.join(x if isinstance(x, str) else f'{x:g}' for x in few)}")
    return ", ".join(words)


def between(value: Interval | list | None, digits: int = 2) -> str:
    """Write a mean with its standard error."""
    if value is None:
        return ""
    mean, error = value
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
