"""What every method does to SmolLM2 at twice its length, from bench/results/smollm2/:

    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb . \\
        && zcat usr/share/doc/jargon-text/jargon.txt.gz > jargon.txt
    python -m extrope_kernels eval --model smollm2 --text pydocs --text jargon.txt --trials 1 \\
        --dtype bfloat16 --lengths 16384 --out bench/results/smollm2 --methods rope,yarn,...
    python -m extrope_kernels eval --task recall ... (the same)

Texts differ more than methods do, so losses are compared piece by piece with those of YaRN.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from extrope_kernels.evaluation.spread import mean_and_error

BASELINE = "yarn"


class Measured(NamedTuple):
    """Of one method; None where it was not measured."""

    parameters: dict[str, Any]
    loss: float | None = None  # nats a token, in the last bucket of positions
    over_yarn: tuple[float, float | None] | None = None  # mean and standard error over pieces
    recall: tuple[float, float | None] | None = None  # at the longest distance


def measured(folder: Path) -> dict[str, Measured]:
    """By method, in the order of the files."""
    losses, recalls = _rows(folder / "loss.json"), _rows(folder / "recall.json")
    found = {}
    for method in [*losses, *(name for name in recalls if name not in losses)]:
        row = losses.get(method) or recalls[method]
        loss = over = recall = None
        if method in losses:
            loss = losses[method]["buckets"][-1]["loss"]
            over = _over(losses[method], losses[BASELINE])
        if method in recalls:
            farthest = recalls[method]["gains"][-1]
            recall = farthest["gain"], farthest["error"]
        found[method] = Measured(row["params"], loss, over, recall)
    return found


def table_lines(folder: Path) -> list[list[str]]:
    """Cells in Markdown, the lowest loss first."""
    lines = []
    for name, row in sorted(measured(folder).items(), key=lambda item: item[1].loss or 99):
        losses = _loss(row.loss), between(row.over_yarn, digits=3)
        lines.append([f"`{name}`", parameters(row), *losses, between(row.recall)])
    return lines


def parameters(row: Measured) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in row.parameters.items())


def between(value: tuple[float, float | None] | None, digits: int = 2) -> str:
    """A mean with its standard error."""
    if value is None:
        return ""
    mean, error = value
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row["method"]: row for row in json.loads(path.read_text())["rows"]}


def _over(row: dict[str, Any], baseline: dict[str, Any]) -> tuple[float, float | None]:
    pairs = zip(row["buckets"][-1]["pieces"], baseline["buckets"][-1]["pieces"], strict=True)
    return mean_and_error([ours - theirs for ours, theirs in pairs])
