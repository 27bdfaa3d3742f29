"""Timings of `make bench` at models' shapes, beside floors and installed peers.

The scripts print and keep each row as soon as it is measured, in the folder of the card.
"""

from __future__ import annotations

import json
from importlib import import_module

import tables
import torch

from .results import Deadline, Verdict, folder

SCORES = ("plain", "rerope", "dual_chunk")
ASKED = tuple(word for score in SCORES for word in ("--score", score))
# By step: the script of bench/, its cases, and more of its options.
TIMED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "rope": ("rope", ("forward, half-split bfloat16", "backward, half-split bfloat16"), ()),
    "attention": ("attention", tuple(f"{name}, forward 32/8" for name in SCORES), ASKED),
    "training": ("attention", ("rerope, training 32/8",), ("--score", "rerope")),
    "decode": ("decode", ("paged",), ()),
}


def run(name: str, deadline: Deadline) -> Verdict:
    script, cases, options = TIMED[name]
    only = [word for case in cases for word in ("--only", case)]
    import_module(f"bench_{script}").main([*only, *options])
    path = folder(torch.cuda.get_device_name()) / f"{script}.json"
    return verdict(json.loads(path.read_text()), cases)


def verdict(results: dict, cases: tuple[str, ...]) -> Verdict:
    rows = [x for x in results["rows"] if any(y in f"{x['case']} {x['dtype']}" for y in cases)]
    measured = [row for row in rows if row["implementation"] == "extrope" and "absent" not in row]
    missed = [
        f"{row['case']}: {row['implementation']} {row['ratio']:.3g} (bar {row['bar']:.3g})"
        for row in rows
        if row.get("verdict") == "missed"
    ]
    line = f"{len(measured)} rows measured; bars missed: {', '.join(missed) or 'none'}"
    return Verdict(bool(measured), line, {"table": tables.comparison({**results, "rows": rows})})
