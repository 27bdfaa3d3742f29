"""Plots of the results of `eval`."""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import name_of, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for a line on white.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def available() -> bool:
    """Return True if matplotlib can draw plots; tables do not need it."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw all rows as PNG: a panel per length and a line per method, with standard errors.

    A method with several sets of parameters has a line for each.
    """
    rows = results["rows"]
    lengths = sorted({row["length"] for row in rows})
    sets = Counter((row["method"], row["length"]) for row in rows)
    several = {method for (method, _), count in sets.items() if count > 1}
    names = [name_of(x["method"], x["params"] if x["method"] in several else {}) for x in rows]
    order = list(dict.fromkeys(names))
    figure = new_figure(8.5, 0.6 + 4.4 * len(lengths))
    panels = figure.subplots(len(lengths), 1, squeeze=False, sharey=True)[:, 0]
    handles: dict[str, Any] = {}  # a panel may lack a line while rows are still missing
    for axes, length in zip(panels, lengths, strict=True):
        for name, row in zip(names, rows, strict=True):
            if row["length"] == length:
                handles[name] = _line(axes, row, name, order.index(name))
        _finish(axes, length, results)
        axes.grid(axis="y", color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right center")
    read = ", ".join(text["name"] for text in results["texts"])
    figure.suptitle(f"{results['model']} on {read}, {results['dtype']}")
    save_figure(figure, path)


def _line(axes: Axes, row: dict[str, Any], name: str, index: int) -> Any:
    """Draw a row's line and return its handle for the legend."""
    if "gains" in row:
        points = [(gain["distance"], gain["gain"], gain["error"]) for gain in row["gains"]]
    else:
        buckets = row["buckets"]
        points = [((b["start"] + b["stop"]) / 2, b["loss"], b["error"]) for b in buckets]
    x, means, errors = zip(*points, strict=True)
    return axes.errorbar(
        x,
        [float("nan") if mean is None else mean for mean in means],
        [error or 0.0 for error in errors] if any(errors) else None,
        color=_COLOURS[index % len(_COLOURS)],
        marker="osD^"[index // len(_COLOURS) % 4],
        capsize=2,
        label=name,
    )


def _finish(axes: Axes, length: int, results: dict[str, Any]) -> None:
    """Draw what a panel has besides its lines."""
    if "distances" in results:
        axes.axhline(0, color="0.35", linewidth=0.8)
        # Set, not taken from the points: if every gain is NaN, there are none.
        axes.set_xlim(results["distances"][0] / 1.15, results["distances"][-1] * 1.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks(results["distances"], [f"{x:,}" for x in results["distances"]])
        axes.set_xlabel("tokens since the passage was first read")
        axes.set_ylabel(f"gain in {length:,} tokens (nats a token)")
        return
    if (trained := results["training_length"]) < length:
        axes.axvline(trained, color="0.35", linestyle=(0, (4, 3)), linewidth=1.2)
        axes.axvspan(trained, length, color="0.95", zorder=0)
        place = axes.get_xaxis_transform()  # tokens, and a share of the height
        axes.text(
            trained, 0.98, f" past the training length, {trained:,}", transform=place, va="top"
        )
    bucket = results["bucket"]
    axes.set_xlim(0, length)
    axes.set_xticks(range(0, length + 1, bucket * max(1, -(-length // (8 * bucket)))))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"position in the text (means over {bucket:,} tokens)")
    axes.set_ylabel("next-token loss (nats)")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG by `write_atomic`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
