"""Runs a search on a loaded model; tells, draws and writes what held-out text says of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...methods import METHODS
from .. import report
from ..models import training_length
from ..plots import available, new_figure, save_figure
from ..report import mean_and_error, with_error
from ..texts import Text
from .candidates import Candidate
from .factors import find_ladder, write_config
from .stages import Ledger, Search

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 60  # about so many measurements; the bar of all of them is a guess


def search_model(
    model: PreTrainedModel,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    settings: dict[str, Any],
    budget: float,
    out: Path,
) -> None:
    """Search, show and write search.json, search.png and extended/config.json in `out`.

    There is no PNG without matplotlib.

    settings: what results depend on, for the head of search.json. budget: seconds.
    """
    ladder = find_ladder(model, training_length(model))
    header = settings | {
        "training_length": ladder.trained,
        "device": str(model.device),
        "versions": report.versions(),
        "rows": [],
    }
    ledger = Ledger(out / "search.json", header, budget)
    print(f"measuring for {budget / 60:g} minutes into {out}", file=sys.stderr, flush=True)
    model.requires_grad_(False)
    with report.open_display(sys.stdout, _ROWS) as display:
        length = settings["length"]
        search = Search(model, ladder, texts, held_out, length, settings["seed"], ledger, display)
        likely, finalists = search.run()
    rows = summarise(finalists, [search.on_held_out(each) for each in finalists])
    frequencies = [each for each in finalists if each.method in (*METHODS, "plain")]
    found = {
        "finalists": rows,
        "factors": {
            each.name: ladder.log_factors(ladder.freqs(each)).exp().tolist() for each in frequencies
        },
        "likely": [each.name for each in likely],
        "seconds": round(ledger.spent, 1),
    }
    ledger.conclude(found)
    if available():
        plot(header | found, out / "search.png")
    _print_best(rows)
    chosen = _best_frequencies(rows, frequencies)
    path = write_config(model, ladder, chosen, length, out / "extended")
    print(f"{path}: {chosen.name}")


def _print_best(rows: list[dict[str, Any]]) -> None:
    if not rows[0]["pieces"]:
        print("search: no time was left for held-out text; a larger --budget goes on from here")
        return
    print("\n".join(table(rows)))
    best = rows[0]
    print(f"best on {len(best['pieces'])} held-out pieces: {best['name']}")
    if best["method"] == "longrope":
        print("its factors are in the configuration, and in search.json")
    else:
        print(best["call"])


def _best_frequencies(rows: list[dict[str, Any]], frequencies: list[Candidate]) -> Candidate:
    """Return the best finalist that a configuration can express: score methods need `extend`."""
    by_name = {each.name: each for each in frequencies}
    for row in rows:
        if row["name"] in by_name and row["pieces"]:
            return by_name[row["name"]]
    return frequencies[-1]  # by text that was searched on


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
