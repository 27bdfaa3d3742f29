"""How much faster than the fastest of the others: python bench/speed_plot.py

Draws docs/speed.svg from bench/results/*-cpu.json, a bar for each of SHOWN.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Of what we do, or of our own kernel otherwise called: no one else's way to the same result.
YARDSTICKS = ("clone", "copy_", "fresh pages", "no window")


class Shown(NamedTuple):
    """A case of bench/results/FILE-cpu.json, and how the plot calls it."""

    label: str
    file: str
    case: str
    dtype: str
    shape: str
    theirs: str = ""  # what the others do where it is less


ROPE, LONG, SHORT = "8192 x 32/8 x 128", "8192 x 8/2 x 128", "2048 x 8/2 x 64"
CACHE = "1 on 32768 x 8/2 x 128"
PLAIN = "plain attention, unrotated"
SHOWN = (
    Shown("rotate q and k", "rope", "forward, default malloc, half-split", "bfloat16", ROPE),
    Shown("into memory that is kept", "rope", "forward, half-split", "bfloat16", ROPE),
    Shown("rotate, and back", "rope", "forward + backward, half-split", "bfloat16", ROPE),
    Shown("ReRoPE", "rerope", "forward 8/2 x 64", "float32", SHORT),
    Shown("ReRoPE", "rerope", "forward 8/2 x 128", "bfloat16", LONG, PLAIN),
    Shown("train by ReRoPE", "rerope", "training 8/2 x 128", "float32", LONG, PLAIN),
    Shown("decode by ReRoPE", "decode", "decode 8/2 x 128", "bfloat16", CACHE, PLAIN),
)


def against_the_best(shown: Shown, results: Path) -> tuple[float, str]:
    """Their time over ours, and who they are: the fastest, of those that do all of it if any."""
    rows = json.loads((results / f"{shown.file}-cpu.json").read_text())["rows"]
    # Ratios, as the tables have them: ours was timed anew beside each of the others.
    ratios = {
        row["implementation"]: row["ratio"]
        for row in rows
        if (row["case"], row["dtype"], row["shape"]) == shown[2:5] and "ratio" in row
    }
    others = [name for name in ratios if name not in YARDSTICKS]
    if not shown.theirs:
        others = [name for name in others if "SDPA" not in name]
    best = max(others, key=ratios.__getitem__)
    return 1 / ratios[best], best


def bar_text(shown: Shown, results: Path) -> str:
    times, best = against_the_best(shown, results)
    return f"{times:.1f} x {best}" + (f" ({shown.theirs})" if shown.theirs else "")


def machines(results: Path) -> str:
    """Where the bars were measured, a line each; of several machines, which bars where."""
    files: dict[str, list[str]] = {}
    for file in dict.fromkeys(shown.file for shown in SHOWN):
        one = json.loads((results / f"{file}-cpu.json").read_text())["machine"]
        name = f"{one['device']}, {one['threads']} threads, torch {one['torch']}"
        files.setdefault(name, []).append(file)
    if len(files) == 1:
        return next(iter(files))
    return "\n".join(f"{', '.join(of)}: {name}" for name, of in files.items())


def plot(results: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "speed"  # the same file from the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"  # words that can be searched
    matplotlib.rcParams["font.family"] = "sans-serif"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.6, 3.4), layout="constrained")
    for row, shown in enumerate(SHOWN):
        times, _ = against_the_best(shown, results)
        axes.barh(row, times, color="tab:red" if shown.file == "rope" else "tab:blue", height=0.6)
        axes.text(times, row, f" {bar_text(shown, results)}", va="center", fontsize=8)
    labels = [f"{shown.label}\n{shown.dtype}, {shown.shape}" for shown in SHOWN]
    axes.set_yticks(range(len(SHOWN)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.45)  # room for the words
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"their time over ours\n{machines(results)}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(ROOT / "bench" / "results", ROOT / "docs" / "speed.svg")
