"""The table of docs/models.md, from bench/results/models.json of bench/models_census.py."""

from __future__ import annotations

import json
from pathlib import Path

FREQUENCY = ("yarn", "dynamic_ntk")
SCORE = ("rerope", "self_extend", "dual_chunk")
_ALL = 'ok, layers="all"'
# What transformers' classes raise goes under these words.
_NO_ROTATION = "must have a rotary embedding"


def table(path: Path) -> str:
    """A summary, the classes that are served in full, and a line for each of the others."""
    results = json.loads(path.read_text())
    built = [row for row in results["rows"] if row["built"] == "ok"]
    rotating = [row for row in built if _NO_ROTATION not in row["yarn"]]
    served = {
        "a frequency method": _served(rotating, ("rope, neutral", *FREQUENCY)),
        "a score method": _served(rotating, ("rerope, neutral", *SCORE)),
    }
    lines = [
        f"transformers {results['transformers']}: {len(results['rows'])} classes with rotary "
        f"parameters, {len(built)} of which can be built alone and run on text.",
        "",
    ]
    for sort, names in served.items():
        share = len(names) / len(rotating)
        lines.append(f"- By {sort}: {len(names)} of the {len(rotating)} that rotate ({share:.0%}).")
    both = sorted(set.intersection(*map(set, served.values())), key=str.lower)
    marked = {row["name"]: row["name"] + _mark(row) for row in built}
    lines += ["", f"By both: {', '.join(marked[name] for name in both)}.", ""]
    lines += ['\\* Score methods with `layers="all"`, \\*\\* frequency methods too. † Forwards']
    lines += ["alone are compared: its own `generate` fails.", ""]
    lines += ["| the others | frequencies | scores |", "| --- | --- | --- |"]
    for row in built:
        if row["name"] not in both:
            sorts = (("rope, neutral", *FREQUENCY), ("rerope, neutral", *SCORE))
            said = [_said(row, methods) for methods in sorts]
            lines.append(f"| {marked[row['name']]} | {' | '.join(said)} |")
    lines += ["", "| not built | why |", "| --- | --- |"]
    lines += [
        f"| {row['name']} | {_plain(row['built'])} |"
        for row in results["rows"]
        if row["built"] != "ok"
    ]
    return "\n".join(lines)


def _served(rows: list[dict], methods: tuple[str, ...]) -> list[str]:
    return [row["name"] for row in rows if all(row[m].startswith("ok") for m in methods)]


def _mark(row: dict) -> str:
    needs_all = [row["rerope"] == _ALL, any(row[method] == _ALL for method in FREQUENCY)]
    return "*" * sum(needs_all) + "†" * (row["generates"] != "ok")


def _said(row: dict, methods: tuple[str, ...]) -> str:
    reasons = [row[method] for method in methods if not row[method].startswith("ok")]
    return _plain(reasons[0]) if reasons else "yes"


def _plain(reason: str) -> str:
    """The reason without what every error begins with."""
    for words in ("is not a supported architecture: ", "extend: ", "Error: "):
        reason = reason.split(words, 1)[-1]
    return reason.replace("|", "/").strip()
