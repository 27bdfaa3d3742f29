"""The table and the plot of length_generalization.py."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from extrope_kernels.evaluation.spread import with_error

HIGHEST, CLOSEST = 1.5, 0.06  # nats: shown above plain RoPE at 1x; between two labels


def head(results: dict) -> list[str]:
    """Loss of the last L bytes at every length, then the mean over the longest."""
    lengths = [read["length"] for read in results["rows"][0]["lengths"]]
    columns = [f"{length:,}" for length in lengths]
    return ["method", "trained", "at the test", *columns, f"all of {columns[-1]}"]


def losses(row: dict) -> list[list[float]]:
    """Of each column, a loss for each seed."""
    return [*(read["last"] for read in row["lengths"]), row["lengths"][-1]["mean"]]


def with_spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    mean = statistics.fmean(values)
    return with_error(mean, statistics.stdev(values) if len(values) > 1 else None, 3)


def as_good(values: list[float], best: list[float]) -> bool:
    """True if the seeds don't tell a loss from the best one: all start from the same weights."""
    over = [loss - least for loss, least in zip(values, best)]
    spread = statistics.stdev(over) if len(over) > 1 else 0.0
    return statistics.fmean(over) <= max(0.01, 2 * spread)


def summary(results: dict) -> str:
    """What was trained and read, and how long it took."""
    setup, machine, text = results["setup"], results["machine"], results["text"]
    trainings = results["trainings"].values()
    minutes = sum(training["seconds"]["cpu"] for training in trainings) / 60
    return (
        f"{setup['layers']} layers of {setup['d_model']}, {setup['heads']} heads; L = "
        f"{setup['length']}; {setup['steps']:,} steps of {setup['batch']} x {setup['length']} "
        f"bytes out of {text['train_bytes'] / 1e6:.1f} MB, tuned for {setup['tune_steps']}; "
        f"{setup['windows']} x {setup['length']} bytes scored; {setup['seeds']} seeds, mean and "
        f"standard deviation. {machine['device']}, torch {machine['torch']}: the "
        f"{len(trainings)} trainings took {minutes:.0f} minutes of a core, with all seeds."
    )


def printed(results: dict) -> str:
    lines = [head(results)]
    for row in results["rows"]:
        numbers = map(with_spread, losses(row))
        lines.append([row["name"], row["trained"], row["run"], *numbers])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(x.ljust(width) for x, width in zip(line, widths)) for line in lines]
    return "\n".join([summary(results), "", *rows])


def plot(results: dict, path: Path) -> None:
    """Loss of the last L bytes by length, bands of the seeds: a panel a family, each with RoPE."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    plain = results["rows"][0]
    lowest = min(min(read["last"]) for row in results["rows"] for read in row["lengths"])
    top = statistics.fmean(plain["lengths"][0]["last"]) + HIGHEST
    families = dict.fromkeys(row["family"] for row in results["rows"])
    for axes, family in zip(panels.flat, families):
        _line(axes, plain, color="0.6", linestyle="--")
        rows = [row for row in results["rows"] if row["family"] == family and row is not plain]
        for index, row in enumerate(rows):
            bright = matplotlib.colormaps["turbo"](0.05 + 0.9 * index / max(1, len(rows) - 1))
            _line(axes, row, color=[0.8 * x for x in bright[:3]], marker="o")
        axes.set(title=family, xscale="log", ylim=(lowest - 0.1, top))
        lengths = [read["length"] for read in plain["lengths"]]
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlim(lengths[0] * 0.93, lengths[-1] * 1.08)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, top)
    for axes in panels[:, 0]:
        axes.set_ylabel("nats per byte, last L bytes")
    for axes in panels[1]:
        axes.set_xlabel(f"bytes read (trained on L = {results['setup']['length']})")
    with matplotlib.rc_context({"svg.hashsalt": "extrope"}):  # the same file from the same numbers
        figure.savefig(path, metadata={"Date": None})


def _line(axes: Axes, row: dict, **style: object) -> None:
    reads = row["lengths"]
    x = [read["length"] for read in reads]
    y = [statistics.fmean(read["last"]) for read in reads]
    axes.plot(x, y, label=row["name"], markersize=4, linewidth=1.6, **style)
    lowest, highest = zip(*((min(read["last"]), max(read["last"])) for read in reads))
    axes.fill_between(x, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def _label(axes: Axes, top: float) -> None:
    """Names at the lines' ends, moved apart; a line that leaves the panel is named at its top."""
    ends = sorted(((line.get_ydata()[-1], line) for line in axes.lines), key=lambda end: end[0])
    places = [min(y, top - CLOSEST) for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + CLOSEST)
    excess = max(0.0, places[-1] - (top - CLOSEST / 2))
    for i in reversed(range(len(places))):  # from the top down, only as far as is needed
        ceiling = places[-1] - excess if i == len(places) - 1 else places[i + 1] - CLOSEST
        places[i] = min(places[i], ceiling)
    for place, (y, line) in zip(places, ends):
        name = line.get_label() if y <= top else f"{line.get_label()} ({y:.1f})"
        axes.annotate(
            name, (line.get_xdata()[-1], place), xytext=(8, 0), textcoords="offset points",
            va="center", color=line.get_color(), fontsize=8, annotation_clip=False,
        )  # fmt: skip
