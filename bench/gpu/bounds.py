"""The audit's bounds: what a launch takes at least on a card, at the shapes of bench/shapes.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from audit import report
from audit.case import Case
from audit.chips import CARDS, Card
from audit.row import Row

from .step import RESULTS

# What torch calls the cards whose peaks are known; others, with their own memory, have no bound.
NAMES = {
    r"A100-SXM4-80GB": CARDS[80],
    r"H100 80GB HBM3": CARDS[90],
    # Its data sheet differs from the H100's in memory alone.
    r"H200$": Card("H200", 90, 132, 1.83e9, 4.8e12, 989.4e12, CARDS[90].of_a_warp),
    r"\bB200": CARDS[100],
}


def card_of(name: str) -> Card | None:
    return next((card for pattern, card in NAMES.items() if re.search(pattern, name)), None)


@cache
def audited() -> Mapping[Case, Row]:
    return report.load(RESULTS / "gpu_audit.json")


def seconds(row: Row, card: Card) -> dict[str, float]:
    """The row's, which are those of its chip's card, on another card of that chip."""
    base = CARDS[row.capability]
    cycles = base.clock * base.processors / (card.clock * card.processors)
    times = {
        "memory": base.bandwidth / card.bandwidth,
        "tensor": base.tensor / card.tensor,
        "special": cycles,
        "issue": cycles,
    }
    return {name: row.seconds[name] * times[name] for name in row.seconds}


def bound(launches: Iterable[tuple[str, str]], card: Card | None, dtype: str = "bfloat16"):
    """(milliseconds, what binds) of launches one after the other, each (kernel, variant) of the
    audit at head_dim 128; None where the card is not known. What the audit lacks takes no time: a
    bound still.
    """
    if card is None:
        return None
    total, by = 0.0, {}
    for kernel, variant in launches:
        row = audited().get(Case(kernel, card.capability, 128, dtype, variant))
        if row is None:
            continue
        found = seconds(row, card)
        most = max(found, key=found.__getitem__)
        total += found[most]
        by[most] = by.get(most, 0.0) + found[most]
    return (total * 1e3, max(by, key=by.__getitem__)) if by else None
