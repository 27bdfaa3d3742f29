"""What `python -m extrope_kernels search` found, at one length and at several.

Losses of pieces differ by more than those of methods: what counts is the difference to YaRN's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import smollm2_table

from extrope_kernels import scores

# Kinds of finalists, as the search has them.
KINDS = {
    "plain": "as it is",
    "yarn": "YaRN by its paper",
    "published": "best published frequencies",
    "searched": "searched factors (`longrope`)",
    "score": "best score method",
}


def found(results: Path) -> dict[str, dict[str, Any]]:
    """By the name of its file, the shortest length first."""
    read = {path.stem: json.loads(path.read_text()) for path in results.glob("search-*k.json")}
    return dict(sorted(read.items(), key=lambda item: item[1]["length"]))


def interval(row: dict[str, Any], name: str) -> str:
    return smollm2_table.between((row[name], row[f"{name}_error"]), digits=3)


def table_lines(search: dict[str, Any]) -> list[list[str]]:
    """A line a finalist, the best first, on text that was not searched on."""
    names = ("loss", "to_yarn", "whole")
    return [
        [f"`{row['name']}`", *(interval(row, name) for name in names)]
        for row in search["finalists"]
    ]


def about(search: dict[str, Any]) -> str:
    read, searched = (", ".join(t["name"] for t in search[key]) for key in ("held_out", "texts"))
    count = len(search["finalists"][0]["pieces"])
    pieces = "piece" if count == 1 else "pieces"
    return (
        f"{search['length']:,} tokens, {count} {pieces} of {read}; "
        f"searched on {searched} in {search['dtype']}."
    )


def by_kind(results: Path) -> tuple[list[str], list[list[str]]]:
    """A column a length: what is best of every kind, and its loss over YaRN's."""
    searches = list(found(results).values())
    head = ["", *(f"{search['length']:,} tokens" for search in searches)]
    lines = [
        [words, *(_cell(search, kind) for search in searches)] for kind, words in KINDS.items()
    ]
    return head, lines


def _cell(search: dict[str, Any], kind: str) -> str:
    row = _of_kind(search, kind)
    if row is None:
        return "YaRN" if kind == "published" else ""
    if kind == "yarn":
        return f"0 (a loss of {interval(row, 'loss')})"
    named = "" if kind in ("plain", "searched") else f"`{row['name']}` "
    sign = "+" if row["to_yarn"] > 0 else ""
    return f"{named}{sign}{interval(row, 'to_yarn')}"


def _of_kind(search: dict[str, Any], kind: str) -> dict[str, Any] | None:
    rows = (row for row in search["finalists"] if row["pieces"] and _kind(row, search) == kind)
    return next(rows, None)


def _kind(row: dict[str, Any], search: dict[str, Any]) -> str:
    method, factor = row["method"], search["length"] / search["training_length"]
    if method in scores.SCORES:
        return "score"
    if method == "yarn" and row["params"] == {"factor": factor}:
        return "yarn"
    return {"plain": "plain", "longrope": "searched"}.get(method, "published")
