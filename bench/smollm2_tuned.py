"""What a fine-tune changes, from what bench/smollm2_finetune.py and bench/model_runs.py measured.

Losses are compared piece by piece with those of the model before, whose parameters of the method
are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from smollm2_table import TWICE, between, named

from extrope_kernels.evaluation.spread import mean_and_error

FOLDER = "smollm2-tuned"


def table_lines(results: Path) -> list[list[str]]:
    """Cells in Markdown, a method each, before and after."""
    return [
        line
        for folder in sorted((results / FOLDER).glob("*"))
        if (folder / "recall.json").exists()
        for line in _lines(results, folder)
    ]


def _lines(results: Path, folder: Path) -> list[list[str]]:
    losses = [_read(where / "loss.json", folder.name) for where in (results / TWICE, folder)]
    recalls = [_read(where / "recall.json", folder.name) for where in (results / TWICE, folder)]
    after = losses[1][0]
    before = _alike(losses[0], after["params"])
    trained = json.loads((folder / "loss.json").read_text())["training_length"]
    cells = [f"`{folder.name}`", named(after["params"])]
    for behind in (False, True):
        pieces = [_pieces(row, trained, behind) for row in (before, after)]
        change = mean_and_error([b - a for a, b in zip(*pieces, strict=True)])
        cells += [f"{fmean(pieces[0]):.3f}", f"{fmean(pieces[1]):.3f}", between(change, digits=3)]
    for row in (_alike(recalls[0], after["params"]), recalls[1][0]):
        farthest = row["gains"][-1]
        cells.append(between((farthest["gain"], farthest["error"])))
    return [cells]


def _read(path: Path, method: str) -> list[dict[str, Any]]:
    return [row for row in json.loads(path.read_text())["rows"] if row["method"] == method]


def _alike(rows: list[dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in rows if row["params"] == params)


def _pieces(row: dict[str, Any], trained: int, behind: bool) -> list[float]:
    """The loss of each piece, up to the training length or behind it."""
    some = [b["pieces"] for b in row["buckets"] if (b["start"] >= trained) == behind]
    return [fmean(each) for each in zip(*some)]
