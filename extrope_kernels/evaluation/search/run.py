"""Runs a search on a loaded model, and writes what comes of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...methods import METHODS
from .. import report
from ..models import training_length
from ..texts import Text
from . import summary
from .candidates import Candidate
from .config import write_config
from .factors import find_ladder
from .ledger import Ledger
from .stages import Search

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
    model.requires_grad_(False)
    with report.open_display(sys.stdout, _ROWS) as display:
        length = settings["length"]
        search = Search(model, ladder, texts, held_out, length, settings["seed"], ledger, display)
        likely, finalists = search.run()
    rows = summary.summarise(finalists, [search.on_held_out(each) for each in finalists])
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
    summary.plot(header | found, out / "search.png")
    _print_best(rows)
    chosen = _best_frequencies(rows, frequencies)
    path = write_config(model, ladder, chosen, length, out / "extended")
    print(f"{path}: {chosen.name}")


def _print_best(rows: list[dict[str, Any]]) -> None:
    if not rows[0]["pieces"]:
        print("search: no time was left for held-out text; a larger --budget goes on from here")
        return
    print("\n".join(summary.table(rows)))
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
