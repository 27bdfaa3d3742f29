"""Time and memory against length and against threads, for any operation: two lines in a benchmark.

    from scaling import scaling
    scaling("rope", lambda n: {"forward": ...}, args)

writes scaling-NAME-DEVICE.json and a plot of the same name. A slope is the exponent of n over the
longest quarter of the range: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Call, Report, device, once, paired, peak_megabytes

LENGTHS = tuple(2**i for i in range(10, 17))
SECONDS = 20.0  # no longer call than this is started: the next length is left out


@dataclass
class ScalingRow:
    """One implementation at one length on some threads; forward time, peak memory over inputs."""

    implementation: str
    seqlen: int
    threads: int
    milliseconds: float
    megabytes: float


COLUMNS = {
    "implementation": ("scaling", 34, ""),
    "seqlen": ("tokens", 7, ""),
    "threads": ("threads", 7, ""),
    "milliseconds": ("ms", 10, ".3f"),
    "megabytes": ("peak MB", 8, ".1f"),
}


def scaling(
    name: str,
    call_of_length: Callable[[int], Call | dict[str, Call]],
    args: argparse.Namespace,
    about: str = "",
) -> None:
    """Measure call_of_length(n), or each of several by name, at all lengths and threads; plot it.

    Selected by --only "scaling", or "scaling NAME 1" for one thread.
    """
    lengths = (16, 32, 64) if args.quick else LENGTHS
    threads = [t for t in thread_counts() if wanted(args, f"scaling {name} {t}")]
    if not threads:
        return
    report = Report(f"scaling-{name}", args, COLUMNS, about=about)
    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        slow: set[str] = set()
        for n in lengths:
            calls = call_of_length(n)
            calls = calls if isinstance(calls, dict) else {name: calls}
            for implementation, call in calls.items():
                if implementation not in slow:
                    row = measure(implementation, n, count, call, args.repeats)
                    report.add(row)
                    if row.milliseconds > SECONDS * 250:  # the next may take four times as long
                        slow.add(implementation)
    torch.set_num_threads(before)
    report.save()
    if args.out is not None:
        path = args.out / f"scaling-{name}-{device()}.json"
        rows = json.loads(path.read_text())["rows"]
        plot(rows, f"{name}: {about}", path.with_suffix(".svg"))
        print("\n".join(summary(rows)))


def wanted(args: argparse.Namespace, title: str) -> bool:
    return not args.only or any(text in title for text in args.only)


def thread_counts() -> list[int]:
    """1, 2, 4, ... up to what torch uses; on a GPU threads do not matter."""
    most = torch.get_num_threads() if device() == "cpu" else 1
    return sorted({min(2**i, most) for i in range((most - 1).bit_length() + 1)})


@torch.no_grad()
def measure(name: str, seqlen: int, threads: int, call: Call, repeats: int) -> ScalingRow:
    first = once(call)
    milliseconds = paired(call, repeats=repeats, seconds=2.0) if first < 2000 else [once(call)]
    return ScalingRow(name, seqlen, threads, milliseconds[0], peak_megabytes(call))


def slope(rows: list[dict], field: str) -> float:
    """The exponent of the length, by least squares over the longest quarter of the lengths."""
    longest = max((row["seqlen"] for row in rows), default=0)
    points = [(math.log(row["seqlen"]), math.log(row[field]))
              for row in rows if row["seqlen"] >= longest / 4 and row[field] > 0]  # fmt: skip
    if len(points) < 2:
        return math.nan
    x, y = (sum(axis) / len(points) for axis in zip(*points))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def curves(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """The rows of each implementation and number of threads, by length."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seqlen"]):
        found.setdefault((row["implementation"], row["threads"]), []).append(row)
    return dict(sorted(found.items()))


def summary(rows: list[dict]) -> list[str]:
    """Slopes of time and memory of every curve, and what more threads gain at its longest."""
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


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Time and peak memory against length, time against threads at the longest common length."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "extrope"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, (time, memory, threads) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    found = curves(rows)
    most = max(count for _, count in found)
    for index, name in enumerate(dict.fromkeys(name for name, _ in found)):
        own = {count: points for (other, count), points in found.items() if other == name}
        for count, points in own.items():
            look = {"color": f"C{index}", "linestyle": "-" if count == most else ":", "marker": "."}
            lengths = [row["seqlen"] for row in points]
            label = f"{name}, {count} threads: slope {slope(points, 'milliseconds'):.2f}"
            time.plot(lengths, [row["milliseconds"] for row in points], label=label, **look)
            if count == most:
                label = f"slope {slope(points, 'megabytes'):.2f}"
                memory.plot(lengths, [row["megabytes"] for row in points], label=label, **look)
        common = min(points[-1]["seqlen"] for points in own.values())
        at = {count: row["milliseconds"] for count, points in own.items()
              for row in points if row["seqlen"] == common}  # fmt: skip
        threads.plot(list(at), list(at.values()), "o-", color=f"C{index}", label=f"{common} tokens")
    for axis, label in ((time, "ms"), (memory, "peak MB over the inputs"), (threads, "ms")):
        scale = (
            "linear" if axis is memory and not any(row["megabytes"] > 0 for row in rows) else "log"
        )
        axis.set(xscale="log", yscale=scale, xlabel="tokens", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=6)
    threads.set(xlabel="threads", xticks=sorted({count for _, count in found}))
    threads.xaxis.set_major_formatter("{x:.0f}")
    threads.minorticks_off()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
