"""The audit's bounds: the least time of a launch on a card, at the shapes of bench/shapes.py."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

from machine_code import CARDS, Card

from .step import RESULTS

# torch's names of the cards with known peaks; others, with their own memory, have no bound.
NAMES = {
    r"A100-SXM4-80GB": CARDS[80],
    r"H100 80GB HBM3": CARDS[90],
    # Its data sheet differs from the H100's only in memory.
    r"H200$": Card("H200", 90, 132, 1.83e9, 4.8e12, 989.4e12, CARDS[90].of_a_warp),
    r"\bB200": CARDS[100],
}


def card_of(name: str) -> Card | None:
    return next((card for pattern, card in NAMES.items() if re.search(pattern, name)), None)


@cache
def audited() -> dict[tuple[str, str, int], dict[str, float]]:
    """Read microseconds of each resource, by kernel, variant and chip, at head_dim 128."""
    with (RESULTS / "gpu_audit.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["head_dim"] == "128"]
    resources = ("memory", "tensor", "special", "issue")
    return {
        (row["kernel"], row["variant"], int(row["chip"])): {
            name: float(row[f"{name}_us"]) for name in resources
        }
        for row in rows
    }


def bound(launches: Iterable[tuple[str, str]], card: Card | None) -> tuple[float, str] | None:
    """Bound launches one after the other: (milliseconds, the binding resource).

    Each launch is a (kernel, variant) of the audit. None for an unknown card: peaks differ within a
    chip.
    """
    if card is None:
        return None
    base, by = CARDS[card.capability], Counter()
    cycles = base.clock * base.processors / (card.clock * card.processors)
    slower = {
        "memory": base.bandwidth / card.bandwidth,
        "tensor": base.tensor / card.tensor,
        "special": cycles,
        "issue": cycles,
    }
    for launch in launches:
        # One that was not audited counts no time: still a bound.
        if times := audited().get((*launch, card.capability)):
            found = {name: time * slower[name] for name, time in times.items()}
            most = max(found, key=found.__getitem__)
            by[most] += found[most]
    return (by.total() / 1e3, by.most_common(1)[0][0]) if by else None
