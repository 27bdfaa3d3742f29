"""Time and memory against length and threads: scaling("rope", lambda n: {"forward": ...}, args)

Writes scaling-NAME.json, which plots.py draws. A slope is the exponent of n over the longest
quarter of the range: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Call, Report, clock, column, device, kept_memory, paired, peak_megabytes

LENGTHS = tuple(2**i for i in range(10, 17))
SECONDS = 5.0  # after a call this long the next length is left out: it may take four times longer


@dataclass
class ScalingRow:
    """One implementation at one length on some threads; forward time, peak memory over inputs."""

    implementation: str = column("scaling")
    seqlen: int = column("tokens")
    threads: int = column("threads")
    milliseconds: float = column("ms", ".3f")
    megabytes: float = column("peak MB", ".1f")


def scaling(name: str, calls: Callable[[int], dict[str, Call]], args: Any, about: str) -> None:
    """Measure each call at all lengths, on one thread and on all. --only "scaling" selects it."""
    if args.only and not any(text in f"scaling {name}" for text in args.only):
        return
    report = Report(f"scaling-{name}", args, about=about)
    before = torch.get_num_threads()
    for threads in sorted({1, before}) if device() == "cpu" else [1]:
        torch.set_num_threads(threads)
        slow: set[str] = set()
        for n in (16, 32, 64) if args.quick else LENGTHS:
            for implementation, call in calls(n).items():
                if implementation not in slow:
                    row = measure(implementation, n, threads, call, args.repeats)
                    report.add(row)
                    if row.milliseconds > SECONDS * 1e3:
                        slow.add(implementation)
    torch.set_num_threads(before)
    report.save()
    print("\n".join(summary([vars(row) for row in report.rows])))


@torch.no_grad()
@kept_memory()
def measure(name: str, seqlen: int, threads: int, call: Call, repeats: int) -> ScalingRow:
    once = clock(call)
    times = paired(call, repeats=repeats, seconds=2.0) if once() < 2000 else [once()]
    return ScalingRow(name, seqlen, threads, times[0], peak_megabytes(call))


def slope(rows: list[dict], field: str) -> float:
    """Fit the exponent of the length over the longest quarter of the lengths."""
    longest = max((row["seqlen"] for row in rows), default=0)
    own = [row for row in rows if row["seqlen"] >= longest / 4 and row[field] > 0]
    if len(own) < 2:
        return math.nan
    logs = ([math.log(row[name]) for row in own] for name in ("seqlen", field))
    return statistics.linear_regression(*logs).slope


def curves(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Group rows by implementation and number of threads, in order of length."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seqlen"]):
        found.setdefault((row["implementation"], row["threads"]), []).append(row)
    return dict(sorted(found.items()))


def summary(rows: list[dict]) -> list[str]:
    """Summarize every curve: slopes of time and memory, and the gain by more threads."""
    lines, found = [], curves(rows)
    for (name, threads), own in found.items():
        last = own[-1]
        line = f"{name}, {threads} threads: time ~ n^{slope(own, 'milliseconds'):.2f}"
        if not math.isnan(memory := slope(own, "megabytes")):
            line += f", memory ~ n^{memory:.2f}"
        alone = {row["seqlen"]: row["milliseconds"] for row in found.get((name, 1), [])}
        if threads > 1 and last["seqlen"] in alone:
            gain = alone[last["seqlen"]] / last["milliseconds"]
            line += f"; {gain:.2f} times one thread at {last['seqlen']} tokens"
        lines.append(line)
    return lines
