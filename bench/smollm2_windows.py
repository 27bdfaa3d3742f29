"""What ReRoPE's window does to SmolLM2's loss and recall: python bench/smollm2_windows.py

Draws docs/windows.svg from what bench/model_runs.py measured at twice the training length.
"""

from __future__ import annotations

from pathlib import Path

import smollm2_table
from smollm2_table import Interval, Measured

ROOT = Path(__file__).parents[1]
PANELS = {
    "loss over YaRN's behind 8,192 tokens": "over_yarn",
    "recall 15,360 tokens back": "recall",
}


def line_of(name: str, row: Measured) -> str | None:
    """The line in the plot that a row is a point of."""
    if name == "leaky_rerope" and "log_n" not in row.parameters:
        return f"leaky, factor {row.parameters['factor']:g}"
    if name == "rerope":
        return "ReRoPE, log-n" if "log_n" in row.parameters else "ReRoPE"
    return None


def points(results: Path, measure: str) -> dict[str, dict[int, Interval]]:
    """By line and window."""
    found: dict[str, dict[int, Interval]] = {}
    for name, rows in smollm2_table.measured(results).items():
        for row in rows:
            line, value = line_of(name, row), getattr(row, measure)
            if line is not None and value is not None:
                found.setdefault(line, {})[row.parameters["window"]] = value
    return found


def plot(results: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "windows"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    for axes, (title, measure) in zip(panels, PANELS.items(), strict=True):
        for (line, values), marker in zip(points(results, measure).items(), "osD^v", strict=False):
            windows = sorted(values)
            means = [values[window][0] for window in windows]
            errors = [values[window][1] or 0.0 for window in windows]
            axes.errorbar(windows, means, errors, label=line, marker=marker, capsize=3)
        axes.axhline(0, color="0.35", linewidth=0.8)
        axes.set_xticks([1024, 2048, 3072, 4096, 6144], ["1k", "2k", "3k", "4k", "6k"])
        axes.set_xlabel("window")
        axes.set_title(f"{title} (nats a token)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(ROOT / "bench" / "results", ROOT / "docs" / "windows.svg")
