"""What held-out text says of the finalists: a table, a plot, and who is best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import new_figure, save_figure
from ..spread import mean_and_error, with_error
from .candidates import Candidate


def summarise(
    candidates: Sequence[Candidate], measured: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return a row for each finalist, of the pieces that all of them have read, the best first.

    Losses of pieces differ by more than those of methods, so what a method saves is told against
    the first finalist but one, YaRN by its paper, piece by piece.
    """
    pieces = min(map(len, measured))
    losses = [[row["loss"] for row in rows[:pieces]] for rows in measured]
    found = []
    for candidate, rows, own in zip(candidates, measured, losses, strict=True):
        row: dict[str, Any] = {
            "name": candidate.name,
            "method": candidate.method,
            "params": candidate.params,
            "call": candidate.call,
            "pieces": own,
        }
        if pieces:
            against = [loss - yarn for loss, yarn in zip(own, losses[1], strict=True)]
            row["first_piece"] = rows[0]["eighths"]
            for name, values in (
                ("loss", own),
                ("to_yarn", against),
                ("whole", [each["whole"] for each in rows[:pieces]]),
            ):
                row[name], row[f"{name}_error"] = mean_and_error(values)
        found.append(row)
    return sorted(found, key=lambda row: row["loss"]) if pieces else found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    head = f"{'last quarter':>14} {'to yarn':>14} {'whole':>14}  method"
    lines = []
    for row in rows:
        cells = [
            with_error(row[name], row[f"{name}_error"], 3) for name in ("loss", "to_yarn", "whole")
        ]
        lines.append(" ".join(f"{cell:>14}" for cell in cells) + f"  {row['name']}")
    return [head, *lines]


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the finalists' losses and the factors of their pairs, as PNG."""
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    rows = [row for row in results["finalists"] if "loss" in row]
    for place, row in enumerate(reversed(rows)):
        left.errorbar(
            row["to_yarn"], place, xerr=row["to_yarn_error"], fmt="o", color="#0072B2", capsize=3
        )
    left.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    left.axvline(0, color="0.35", linewidth=0.8)
    # A model as it is may be nats behind, where the others differ by hundredths.
    left.set_xscale("symlog", linthresh=0.1)
    left.set_xlabel("loss of the last quarter, to YaRN's (nats a token; 0 is YaRN)")
    for name, factors in results["factors"].items():
        right.plot(factors, marker=".", label=name)
    right.set_xlabel("pair, from the fastest")
    right.set_ylabel("factor: RoPE's frequency over this one")
    right.set_yscale("log", base=2)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.88")
    held_out = ", ".join(text["name"] for text in results["held_out"])
    figure.suptitle(f"{results['model']}, {results['length']:,} tokens of {held_out}")
    save_figure(figure, path)
