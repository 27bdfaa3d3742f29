"""Draw the plots of docs/ from the measured files: python bench/plots.py [NAME ...]"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import evaluations
import ruler
import scaling
from evaluations import named
from harness import RESULTS
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from extrope_kernels.scores import SCORES

DOCS = Path(__file__).parents[1] / "docs"


def save(figure: Figure, path: Path, *sources: Path) -> None:
    """Write a picture, the same file everywhere, with the digest of the results that it shows."""
    metadata = {"Software": None, "Source": digest(*sources)}
    figure.savefig(path, dpi=110, metadata=metadata)


def digest(*sources: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def new_plot(width: float, height: float, *grid: int, **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes, which have no upper and right edge."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(*grid, **options)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


# -------------------------------------------------------------------------------------------------
# Speed: times of the fastest others over ours


class Shown(NamedTuple):
    """A case of a benchmark's file, and its label in the plot."""

    label: str
    file: str
    case: str
    dtype: str
    shape: str
    theirs: str = ""  # what the others compute, if less


YARDSTICKS = ("clone", "copy_", "no window")  # not other ways to the same result
ROPE, LONG, SHORT = "8192 x 32/8 x 128", "8192 x 8/2 x 128", "2048 x 8/2 x 64"
CACHE = "1 on 32768 x 8/2 x 128"
PLAIN = "plain attention, no rotation"
MACHINE = "amx"  # its folder of results: all bars and curves are of one processor
SHOWN = (
    Shown("rotate q and k", "rope", "forward, half-split", "bfloat16", ROPE),
    Shown("rotate, and back", "rope", "forward + backward, half-split", "bfloat16", ROPE),
    Shown("ReRoPE", "attention", "rerope, forward 8/2 x 64", "float32", SHORT),
    Shown("ReRoPE", "attention", "rerope, forward 8/2 x 128", "bfloat16", LONG, PLAIN),
    Shown("decode with ReRoPE", "decode", "decode 8/2 x 128", "bfloat16", CACHE, PLAIN),
)


def against_the_best(shown: Shown, results: Path = RESULTS) -> tuple[float, str]:
    """Return the fastest other's time over ours, and its name; of those that do as much, if any."""
    rows = json.loads((results / MACHINE / f"{shown.file}.json").read_text())["rows"]
    own = [row for row in rows if (row["case"], row["dtype"], row["shape"]) == shown[2:5]]
    left_out = YARDSTICKS if shown.theirs else (*YARDSTICKS, "SDPA", "SDPA, keys repeated")
    others = [x for x in own if "ratio" in x and x["implementation"] not in left_out]
    # Ratios as in the tables: ours was timed anew beside each of the others.
    best = max(others, key=lambda row: row["ratio"])
    return 1 / best["ratio"], best["implementation"]


def speed(path: Path, results: Path = RESULTS) -> None:
    """Draw a bar for each case; grey where the others compute less."""
    figure, axes = new_plot(6.4, 4.4)
    colours = {False: "#0072B2", True: "#9a9a9a"}
    found = [against_the_best(shown, results) for shown in SHOWN]
    for place, (shown, (times, best)) in enumerate(zip(SHOWN, found, strict=True)):
        axes.barh(place, times, height=0.62, color=colours[bool(shown.theirs)])
        axes.text(times, place, f" {times:.1f} x {best}", va="center", fontsize=11)
    axes.set_yticks(range(len(SHOWN)), [f"{s.label}\n{s.dtype}" for s in SHOWN], fontsize=11)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.text(1, -0.75, "1: as fast", ha="center", fontsize=10)
    longest = max(times for times, _ in found)
    axes.set_xlim(0, 1.9 * longest)  # room for the names
    axes.set_xticks(range(int(longest) + 1))
    axes.set_xlabel("times as fast as the fastest other", fontsize=12, loc="left")
    told = {"the same result": colours[False], f"it does less: {PLAIN}": colours[True]}
    keys = [Patch(color=colour, label=label) for label, colour in told.items()]
    figure.legend(handles=keys, frameon=False, fontsize=11, loc="outside lower left", ncols=2)
    save(figure, path, *sources("speed", results))


# -------------------------------------------------------------------------------------------------
# Scaling


def lengths(name: str, path: Path, results: Path = RESULTS) -> None:
    """Draw time and peak memory against length; dotted: one thread."""
    content = json.loads((results / MACHINE / f"scaling-{name}.json").read_text())
    figure, (time, memory) = new_plot(6, 7.6, 2, 1)
    found = scaling.curves(content["rows"])
    most = max(threads for _, threads in found)
    names = list(dict.fromkeys(name for name, _ in found))
    for (implementation, threads), rows in found.items():
        look = {"color": f"C{names.index(implementation)}", "marker": ".",
                "linestyle": "-" if threads == most else ":"}  # fmt: skip
        tokens = [row["seqlen"] for row in rows]
        slope = scaling.slope(rows, "milliseconds")
        label = f"{implementation}, {threads} threads: slope {slope:.2f}"
        time.plot(tokens, [row["milliseconds"] for row in rows], label=label, **look)
        if threads == most:
            memory.plot(tokens, [row["megabytes"] for row in rows], label=implementation, **look)
    for axes, label in ((time, "ms"), (memory, "peak MB over the inputs")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.grid(True, alpha=0.3)
    figure.suptitle(content["about"].replace(", 2 heads", ",\n2 heads"), fontsize=11)
    keys = time.get_legend_handles_labels()
    figure.legend(*keys, frameon=False, fontsize=10, loc="outside lower center")
    save(figure, path)


# -------------------------------------------------------------------------------------------------
# SmolLM2

# Colour, marker, its size, and label of the methods of `make demo` and of README.
LOOKS = {
    "rope": ("#000000", "o", 6, "unmodified"),
    "pi": ("#D55E00", "^", 6, "PI"),
    "yarn": ("#0072B2", "s", 9, "YaRN"),
    "rerope": ("#009E73", "D", 5, "ReRoPE"),
    "leaky_rerope": ("#CC79A7", "v", 6, "Leaky ReRoPE"),
}


def demo(path: Path, results: Path = RESULTS) -> None:
    loss, recall = (evaluations.read(name, results) for name in ("demo", "recall"))
    save(draw_demo(loss, recall), path, *sources("demo", results))


def draw_demo(loss: dict, recall: dict) -> Figure:
    """Draw loss by position, and below it recall by distance, of the methods in LOOKS."""
    figure, (upper, lower) = new_plot(6, 6.4, 2, 1)
    bucket, trained = loss["bucket"], loss["training_length"]
    read = bucket * len(loss["rows"][0]["losses"])
    for row in loss["rows"]:
        if row["method"] == "leaky_rerope":  # here its line is ReRoPE's
            continue
        if look := _look(row["method"]):
            middles = [(n + 0.5) * bucket for n in range(len(row["losses"]))]
            upper.plot(middles, row["losses"], **look)
    for row in recall["rows"]:
        gains, errors = zip(*row["gains"], strict=True)
        lower.errorbar(recall["distances"], gains, errors, capsize=3, **_look(row["method"]))
    upper.axvspan(trained, read, color="0.94", zorder=0)
    upper.text(trained, 0.97, " past the training length", va="top", fontsize=11,
               transform=upper.get_xaxis_transform())  # fmt: skip
    upper.set(xlim=(0, read), xlabel="position in the text", ylabel="loss (nats a token)")
    upper.set_title("How well the next token is predicted", loc="left", fontsize=12)
    upper.set_xticks(range(0, read + 1, trained // 2))
    upper.xaxis.set_major_formatter("{x:,.0f}")
    lower.axhline(0, color="0.35", linewidth=0.8)
    lower.set_xscale("log", base=2)
    lower.set_xticks(recall["distances"], [f"{x:,}" for x in recall["distances"]])
    lower.set(xlabel="tokens since the passage was read", ylabel="gain (nats a token)")
    lower.set_title("How much a second reading of a passage helps", loc="left", fontsize=12)
    for axes in (upper, lower):
        axes.grid(axis="y", color="0.88")
    keys = upper.get_legend_handles_labels()
    figure.legend(*keys, frameon=False, fontsize=11, loc="outside lower center", ncols=4)
    return figure


def _look(method: str, more: str = "") -> dict:
    """Return how a method is drawn; nothing if it is not."""
    if method not in LOOKS:
        return {}
    colour, marker, size, label = LOOKS[method]
    return {"color": colour, "marker": marker, "markersize": size, "label": label + more}


def far(path: Path, results: Path = RESULTS) -> None:
    """Draw the loss of each long text by position; the plain model leaves the panels."""
    found = evaluations.read("smollm2-64k", results)
    bucket, trained = found["bucket"], found["training_length"]
    rows = [row for method in LOOKS for row in found["rows"] if row["method"] == method]
    read = bucket * len(rows[0]["positions"])
    figure, panels = new_plot(6, 6.4, 2, 1, sharex=True)
    titles = ("The reference of Python", "The Jargon File")
    for index, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for row in rows:
            parameters = named(row["params"])
            of_yarn = f", {parameters}" if row["method"] == "yarn" else ""
            line = "--" if parameters == "factor=16" else "-"
            losses = [texts[index] for texts in row["positions"]]
            middles = [(place + 0.5) * bucket for place in range(len(losses))]
            axes.plot(middles, losses, line, **_look(row["method"], of_yarn))
        axes.axvspan(trained, read, color="0.94", zorder=0)
        axes.text(read, 0.97, "past the training length ", ha="right", va="top", fontsize=11,
                  transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set(xlim=(0, read), ylim=(1.75, 6.25), ylabel="loss (nats a token)")
        axes.set_title(title, loc="left", fontsize=12)
        axes.grid(axis="y", color="0.88")
    axes.set_xticks(range(0, read + 1, 2 * trained))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("position in the text")
    keys = axes.get_legend_handles_labels()
    figure.legend(*keys, frameon=False, fontsize=11, loc="outside lower center", ncols=3)
    save(figure, path, *sources("far", results))


TRAINED = 8192  # tokens, of SmolLM2
WORST = 0.35  # nats over YaRN; methods that cost more are left out
MARKERS = dict(zip(SCORES, cycle("os^Dv*PX")))  # their points lie too close for names


def tradeoff(path: Path, results: Path = RESULTS) -> None:
    """Draw loss against recall at twice the training length; a line joins a method's parameters."""
    figure, axes = new_plot(6, 6.4)
    labels: dict[tuple[float, float], list[tuple[str, str]]] = {}  # by place
    for name, every in evaluations.measured(results).items():
        rows = [row for row in every if row.over_yarn and row.recall and row.over_yarn[0] < WORST]
        if not rows:
            continue
        rows.sort(key=lambda row: row.over_yarn[0])
        costs, cost_errors = zip(*(row.over_yarn for row in rows), strict=True)
        gains, errors = zip(*(row.recall for row in rows), strict=True)
        style = {"color": "tab:red", "marker": MARKERS.get(name), "label": name}
        if name not in SCORES:
            style = {"color": "tab:blue", "marker": "."}
            x, y = costs[-1], gains[-1]
            close = (at for at in labels if abs(at[0] - x) < 0.01 and abs(at[1] - y) < 0.1)
            labels.setdefault(next(close, (x, y)), []).append((name, named(rows[-1].parameters)))
        axes.errorbar(costs, gains, errors, cost_errors, linewidth=0.8, elinewidth=0.4, **style)
    for place, here in labels.items():
        # If several share a place, only the first has room for its parameters.
        names = [" ".join(filter(None, here[0])), *(name for name, _ in here[1:])]
        text = {"textcoords": "offset points", "fontsize": 9, "color": "tab:blue"}
        axes.annotate(", ".join(names), place, (5, 4), **text)
    axes.set_xlabel("loss over YaRN's behind 8,192 tokens (nats a token)")
    axes.set_ylabel("recall 15,360 tokens back (nats a token)")
    figure.legend(frameon=False, fontsize=10, title="score methods", loc="outside lower center",
                  ncols=3)  # fmt: skip
    save(figure, path)


def ruler_shares(path: Path, results: Path = RESULTS) -> None:
    """Draw the share of RULER's needles by length, with Wilson's interval of 95%."""
    cells = [cell for cell in ruler.read(results / "ruler" / "smollm2.csv")
             if cell.task == ruler.TASKS[0] and cell.length <= 2 * TRAINED]  # fmt: skip
    lengths = sorted({cell.length for cell in cells})
    figure, axes = new_plot(6, 3.6)
    shown = [each for each in ruler.METHODS["smollm2"] if (each[0] or "rope") in LOOKS]
    for place, (method, parameters) in enumerate(ruler.names(*each) for each in shown):
        if not (own := [cell for cell in cells if cell.key[3:] == (method, parameters)]):
            continue
        beside = [lengths.index(cell.length) + 0.05 * (place - 1.5) for cell in own]
        shares = [fmean(cell.scores) for cell in own]
        ends = [ruler.interval(cell) for cell in own]
        errors = [[share - low for share, (low, _) in zip(shares, ends)],
                  [high - share for share, (_, high) in zip(shares, ends)]]  # fmt: skip
        dashed = "--" if parameters == "factor=4" else "-"
        look = _look(method, f", {parameters}" if parameters else "")
        axes.errorbar(beside, shares, errors, linestyle=dashed, capsize=3, **look)
    axes.axvspan(lengths.index(TRAINED) + 0.2, len(lengths) - 0.5, color="0.94", zorder=0)
    axes.text(lengths.index(TRAINED) + 0.22, 1.07, "past the training length", fontsize=11)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set(xlabel="tokens of the text", ylabel="needles found", ylim=(-0.05, 1.15))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlim(-0.3, len(lengths) - 0.5)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=11, loc="lower left")
    save(figure, path, *sources("ruler", results))


# -------------------------------------------------------------------------------------------------
# Small models

SMALL = "length_generalization"
HIGHEST, CLOSEST = 1.5, 0.06  # nats: shown above plain RoPE at 1x; between two labels


def draw_lengths(found: dict, path: Path) -> None:
    """Draw the loss of the last L bytes by length, with bands of the seeds: a panel per family."""
    figure, panels = new_plot(6, 18, 4, 1)
    rows, at = found["rows"], found["lengths"]
    plain = rows[0]
    lowest = min(min(losses) for row in rows for losses in row["last"])
    top = fmean(plain["last"][0]) + HIGHEST
    for axes, family in zip(panels.flat, dict.fromkeys(row["family"] for row in rows)):
        _line(axes, at, plain, color="0.6", linestyle="--")
        own = [row for row in rows if row["family"] == family and row is not plain]
        for index, row in enumerate(own):
            bright = colormaps["turbo"](0.05 + 0.9 * index / max(1, len(own) - 1))
            _line(axes, at, row, color=[0.8 * x for x in bright[:3]], marker="o")
        axes.set(title=family, xscale="log", ylim=(lowest - 0.1, top))
        axes.set_xticks(at, [f"{length:,}" for length in at])
        axes.minorticks_off()
        axes.set_xlim(at[0] * 0.93, at[-1] * 1.08)
        axes.grid(axis="y", color="0.9")
        axes.set_ylabel("nats per byte, last L bytes")
        _label(axes, top)
    axes.set_xlabel(f"bytes read (trained on L = {found['setup']['length']})")
    save(figure, path)


def _line(axes: Axes, at: list[int], row: dict, **style: object) -> None:
    means = [fmean(losses) for losses in row["last"]]
    axes.plot(at, means, label=row["name"], markersize=4, linewidth=1.6, **style)
    lowest, highest = zip(*((min(losses), max(losses)) for losses in row["last"]))
    axes.fill_between(at, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def _label(axes: Axes, top: float) -> None:
    """Write names at the lines' ends, moved apart; at the top if a line leaves the panel."""
    ends = sorted(((line.get_ydata()[-1], line) for line in axes.lines), key=lambda end: end[0])
    places = [min(y, top - CLOSEST) for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + CLOSEST)
    excess = max(0.0, places[-1] - (top - CLOSEST / 2))
    for i in reversed(range(len(places))):  # from the top down, only as far as needed
        ceiling = places[-1] - excess if i == len(places) - 1 else places[i + 1] - CLOSEST
        places[i] = min(places[i], ceiling)
    for place, (y, line) in zip(places, ends):
        name = line.get_label() if y <= top else f"{line.get_label()} ({y:.1f})"
        axes.annotate(
            name, (line.get_xdata()[-1], place), xytext=(8, 0), textcoords="offset points",
            va="center", color=line.get_color(), fontsize=9.5, annotation_clip=False,
        )  # fmt: skip


SOURCES = {  # of pictures whose captions tell numbers
    "ruler": ("ruler/smollm2.csv",),
    "demo": ("models/demo.json", "models/recall.json"),
    "far": ("models/smollm2-64k.json",),
    "speed": tuple(f"{MACHINE}/{name}.json" for name in ("rope", "attention", "decode")),
}


def sources(name: str, results: Path = RESULTS) -> list[Path]:
    """Return the files of results that a picture shows."""
    return [results / file for file in SOURCES[name]]


PLOTS: dict[str, Callable[[Path], None]] = {
    "speed": speed,
    "scaling-rope": lambda path: lengths("rope", path),
    "scaling-attention": lambda path: lengths("attention", path),
    "demo": demo,
    "far": far,
    "ruler": ruler_shares,
    "tradeoff": tradeoff,
    SMALL: lambda path: draw_lengths(evaluations.read(SMALL), path),
}


if __name__ == "__main__":
    for name in sys.argv[1:] or PLOTS:
        PLOTS[name](DOCS / f"{name}.png")
