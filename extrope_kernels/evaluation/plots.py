"""Plots of the results."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for a line on white.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vPX"
_STYLES = ("-", "--", ":")


def available() -> bool:
    """Return True if matplotlib can draw plots; tables do not need it."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_loss(results: dict[str, Any], path: Path) -> None:
    """Draw the loss by bucket as PNG, a panel per length and a line per method."""

    def points(row: dict[str, Any]) -> list[tuple[float, float, float]]:
        middles = [(bucket["start"] + bucket["stop"]) / 2 for bucket in row["buckets"]]
        return [
            (middle, bucket["loss"], bucket["error"] or 0.0)
            for middle, bucket in zip(middles, row["buckets"], strict=True)
        ]

    figure, panels = _lines(results, points)
    for length, axes in panels.items():
        _finish_losses(axes, length, results)
    axes.set_xlabel(f"position in the text (means over {results['bucket']:,} tokens)")
    figure.suptitle(f"{results['model']} on {_names(results)}, {results['dtype']}")
    save_figure(figure, path)


def plot_recall(results: dict[str, Any], path: Path) -> None:
    """Draw the gain by distance as PNG, a panel per length and a line per method."""

    def points(row: dict[str, Any]) -> list[tuple[float, float, float]]:
        return [(gain["distance"], gain["gain"], gain["error"] or 0.0) for gain in row["gains"]]

    figure, panels = _lines(results, points)
    for length, axes in panels.items():
        axes.axhline(0, color="0.35", linewidth=0.8)
        # Set, not taken from the points: if every gain is NaN, there are none.
        axes.set_xlim(results["distances"][0] / 1.15, results["distances"][-1] * 1.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks(results["distances"], [f"{x:,}" for x in results["distances"]])
        axes.set_ylabel(f"gain in {length:,} tokens (nats a token)")
        axes.grid(axis="y", color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens since the passage was first read")
    trained = f"trained on {results['training_length']:,} positions"
    figure.suptitle(f"{results['model']} on {_names(results)}: recall, {trained}")
    save_figure(figure, path)


def _names(results: dict[str, Any]) -> str:
    return ", ".join(text["name"] for text in results["texts"])


def _lines(
    results: dict[str, Any], points: Callable[[dict[str, Any]], list[tuple[float, float, float]]]
) -> tuple[Figure, dict[int, Axes]]:
    """Draw (x, mean, standard error) of each row, and return the panel of each length."""
    lengths = sorted({row["length"] for row in results["rows"]})
    figure = new_figure(8.5, 0.6 + 4.4 * len(lengths))
    panels = figure.subplots(len(lengths), 1, squeeze=False, sharey=True)[:, 0]
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    for axes, length in zip(panels, lengths, strict=True):
        for row in results["rows"]:
            if row["length"] == length:
                _draw_line(axes, points(row), row["method"], methods.index(row["method"]))
    figure.legend(*_handles(panels), frameon=False, loc="outside right center")
    return figure, dict(zip(lengths, panels, strict=True))


def _draw_line(
    axes: Axes, points: list[tuple[float, float, float]], label: str, index: int
) -> None:
    x, means, errors = zip(*points, strict=True)
    axes.errorbar(
        x,
        means,
        errors if any(errors) else None,
        label=label,
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
        markersize=5,
        linewidth=1.8,
        capsize=2,
    )


def _finish_losses(axes: Axes, length: int, results: dict[str, Any]) -> None:
    trained = results["training_length"]
    if trained < length:
        axes.axvline(trained, color="0.35", linestyle=(0, (4, 3)), linewidth=1.2)
        axes.axvspan(trained, length, color="0.95", zorder=0)
        axes.annotate(
            f" past the training length, {trained:,}",
            (trained, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            color="0.25",
        )
    axes.set_xlim(0, length)
    axes.set_xticks(_ticks(length, results["bucket"]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("next-token loss (nats)")
    axes.grid(axis="y", color="0.88")
    axes.spines[["top", "right"]].set_visible(False)


def _handles(panels: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    # One panel may lack a method that another has, while rows are still missing.
    by_label: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    return list(by_label.values()), list(by_label)


def _ticks(length: int, bucket: int) -> list[int]:
    step = bucket * max(1, -(-length // (8 * bucket)))
    return list(range(0, length + 1, step))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG by `write_atomic`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
