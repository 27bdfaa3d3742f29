"""What SmolLM2's methods cost and what they recall: python bench/smollm2_tradeoff.py

Draws docs/tradeoff.svg from what bench/model_runs.py measured at twice the training length. A line
joins the parameters of one method.
"""

from __future__ import annotations

from pathlib import Path

import smollm2_table
from smollm2_table import Measured, named

from extrope_kernels.scores import SCORES

ROOT = Path(__file__).parents[1]
WORST = 0.35  # nats over YaRN; what costs more is left out
MARKERS = dict(zip(SCORES, "os^Dv*", strict=False))  # theirs lie too close to be named beside


def shown(results: Path) -> dict[str, list[Measured]]:
    """By method the rows that have both numbers and are not off the plot, the best loss first."""
    found = {}
    for name, rows in smollm2_table.measured(results).items():
        both = [row for row in rows if row.over_yarn and row.recall and row.over_yarn[0] < WORST]
        if both:
            found[name] = sorted(both, key=lambda row: row.over_yarn[0])
    return found


def close(place: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(place[0] - other[0]) < 0.01 and abs(place[1] - other[1]) < 0.1


def plot(results: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tradeoff"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.6, 4.6), layout="constrained")
    labels: dict[tuple[float, float], list[tuple[str, str]]] = {}  # by place
    for name, rows in shown(results).items():
        (costs, cost_errors), (gains, errors) = (
            zip(*(getattr(row, measure) for row in rows), strict=True)
            for measure in ("over_yarn", "recall")
        )
        style = {"color": "tab:red", "marker": MARKERS.get(name), "label": name}
        if name not in SCORES:
            style = {"color": "tab:blue", "marker": "."}
            place = costs[-1], gains[-1]
            taken = next((other for other in labels if close(place, other)), place)
            labels.setdefault(taken, []).append((name, named(rows[-1].parameters)))
        axes.errorbar(costs, gains, errors, cost_errors, linewidth=0.8, elinewidth=0.4, **style)
    for place, here in labels.items():
        # Of several that are one there, only the first has room for its parameters.
        names = [" ".join(filter(None, here[0])), *(name for name, _ in here[1:])]
        text = {"textcoords": "offset points", "fontsize": 7, "color": "tab:blue"}
        axes.annotate(", ".join(names), place, (5, 4), **text)
    axes.set_xlabel("loss over YaRN's behind 8,192 tokens (nats a token)")
    axes.set_ylabel("recall 15,360 tokens back (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="score methods", loc="upper right")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(ROOT / "bench" / "results", ROOT / "docs" / "tradeoff.svg")
