"""Draw every method, and write docs/gallery.md around the pictures: python bench/gallery.py

A new method of the registries needs one line in FREQUENCIES or SCORES below.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from tables import API, api_link, described, link
from torch import Tensor

from extrope_kernels import RopeFreqs, methods, scores
from extrope_kernels.scores.base import FIRST_KEY, SAME, Region, Score

DOCS = Path(__file__).parents[1] / "docs"

# A head of 64 dims, trained on 8,192 tokens, is to read eight times as many.
DIM, BASE, TRAINED, FACTOR = 64, 100_000.0, 8192, 8.0
BY_BASE, BY_FACTOR = {"base": BASE}, {"base": BASE, "factor": FACTOR}
BY_PARTS = BY_FACTOR | {"original_max_position_embeddings": TRAINED}
BY_LENGTH = BY_BASE | {"seq_len": int(FACTOR * TRAINED)}
# Any factors that rise would do for LongRoPE.
OF_PAIRS = [x for x in (1.0, 1.0, 1.2, 1.7, 3.0, 5.0, 7.0, 8.0) for _ in range(DIM // 16)]
FREQUENCIES: dict[str, dict[str, Any]] = {
    "rope": BY_BASE,
    "abf": {"base": 1e6},
    "pi": BY_FACTOR,
    "ntk_aware": BY_FACTOR,
    "dynamic_ntk": BY_LENGTH | {"factor": 1.0, "max_position_embeddings": TRAINED},
    "ntk_by_parts": BY_PARTS,
    "ntk_mixed": BY_FACTOR,
    "yarn": BY_PARTS,
    "dynamic_yarn": BY_LENGTH | {"original_max_position_embeddings": TRAINED},
    "giraffe_power": BY_BASE | {"power": 0.5},
    "giraffe_truncation": BY_BASE | {"truncate_pos": TRAINED},
    "xpos": BY_BASE,
    "llama3": BY_PARTS,
    "longrope": BY_PARTS | BY_LENGTH | {"short_factor": OF_PAIRS, "long_factor": OF_PAIRS},
    "proportional": BY_BASE | {"partial_rotary_factor": 0.75},
    "axial": BY_BASE,
    "cope": BY_BASE | {"clip": 10},
    "mrrope": BY_PARTS,
    "nope": {},
}
# So few tokens that one can be seen, four times those that were trained on.
TOKENS, SHORT = 128, 32
SCORES: dict[str, dict[str, Any]] = {
    "rerope": {"window": 16},
    "leaky_rerope": {"window": 16, "factor": 8.0},
    "self_extend": {"window": 16, "factor": 8},
    "dual_chunk": {"chunk_size": 24, "local_window": 4},
    "blockwise_causal": {"block_size": SHORT},
    "string": {"shift": SHORT, "window": 4},
    "dpe": {"window": 16, "group_sizes": [8, 12, 8, 12, 16, 16, 16, 10]},
}
PLAIN = Score("plain", (Region(FIRST_KEY, SAME, SAME),))

BEFORE, AFTER, LIMIT, UNSEEN = "#8a949e", "#0b62a4", "#c8321f", "#e4e6e8"
AXES = (AFTER, "#d98200", "#0a8754")
NEAR_TO_FAR = colormaps["YlGnBu"].with_extremes(over=LIMIT)
STRIP = ("rope", "yarn", "rerope")  # the three of README


def example(kind: Mapping[str, Callable], examples: Mapping[str, dict], name: str) -> Any:
    """Return what a method of a registry makes of its example; raise ValueError without one."""
    if name not in examples:
        raise ValueError(f"bench/gallery.py has no example of {name}: give it a line")
    return kind[name](*[DIM] * (kind is methods.METHODS), **examples[name])


# -------------------------------------------------------------------------------------------------
# Frequencies

ENDS = 4, 2e7  # of the axis, in tokens


def frequency_examples() -> dict[str, RopeFreqs]:
    """Return the frequencies of every method's example."""
    return {name: example(methods.METHODS, FREQUENCIES, name) for name in methods.METHODS}


def draw_frequencies(axes: Axes, freqs: RopeFreqs) -> None:
    """Draw the wavelength of each pair, before and after, and the trained length as a line."""
    before, after = (
        2 * math.pi / x.inv_freq.double() for x in (methods.rope(DIM, base=BASE), freqs)
    )
    after = after.clamp(max=ENDS[1] / 2)  # what does not rotate, under the ceiling
    pairs = np.arange(len(after))
    axes.axhspan(TRAINED, ENDS[1], color=LIMIT, alpha=0.06, linewidth=0)
    axes.axhline(TRAINED, color=LIMIT, linewidth=1)
    axes.plot(before, color=BEFORE, linewidth=1.4)
    axes.fill_between(pairs, before[: len(after)], after, color=AFTER, alpha=0.2, linewidth=0)
    colours = [AXES[0]] * len(after) if freqs.axes is None else [AXES[a] for a in freqs.axes]
    # What is left of each pair's part of a logit at an eighth of the trained length.
    decay = torch.zeros(len(after)) if freqs.log_decay is None else freqs.log_decay * TRAINED / 8
    alpha = decay.exp().tolist()
    axes.scatter(pairs, after, s=8, color=colours, alpha=alpha, linewidths=0, zorder=3)
    still = freqs.inv_freq == 0
    axes.scatter(pairs[still], after[still], s=14, marker="^", color=AFTER, linewidths=0)
    axes.text(0.04, 0.88, note(freqs), transform=axes.transAxes, va="top", fontsize=7)
    axes.set(yscale="log", ylim=ENDS, xlim=(-1, len(before)))
    axes.set_xticks([0, len(before) - 1], ["fast pairs", "slow"])
    axes.set_yticks([10, TRAINED, 1e6], ["10", "8k", "1M"])
    axes.minorticks_off()
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)


def note(freqs: RopeFreqs) -> str:
    """Return what wavelengths do not show."""
    still, factor = int((freqs.inv_freq == 0).sum()), freqs.attention_factor
    notes = {
        f"logits \N{MULTIPLICATION SIGN} {factor**2:.2f}": factor != 1,
        f"▲ {still} still": still > 0,
        "pale: decays": freqs.log_decay is not None,
        "a colour an axis": freqs.axes is not None,
    }
    return "\n".join(text for text, holds in notes.items() if holds)


# -------------------------------------------------------------------------------------------------
# Scores


def score_examples() -> dict[str, Score]:
    """Return every score method's example."""
    return {name: example(scores.SCORES, SCORES, name) for name in scores.SCORES}


def distances(score: Score, tokens: int = TOKENS) -> Tensor:
    """Return the relative position that each query sees of each key, NaN where it sees none.

    Returns: (queries, keys, pairs) float64, one pair where all pairs of dims see the same
    """
    at = torch.arange(tokens)
    blocks = at // score.granularity * score.granularity
    seen = torch.full((tokens, tokens, 1), math.nan, dtype=torch.float64)
    for region in score.regions:  # a later one holds the nearer keys
        inside = (at >= (blocks + region.start)[:, None]) & (at <= at[:, None])
        of_query, of_key = (m(at).reshape(tokens, -1) for m in (region.q_map, region.k_map))
        seen = torch.where(inside[..., None], of_query[:, None] - of_key, seen)
    return seen


def draw_map(axes: Axes, seen: Tensor) -> None:
    """Draw what every query (downwards) sees of every key (to the right), on average of pairs."""
    mean = seen.mean(-1)
    causal = np.where(torch.ones_like(mean).tril() > 0, 0.0, np.nan)
    axes.imshow(causal, cmap=ListedColormap([UNSEEN]))
    axes.imshow(mean.numpy(), cmap=NEAR_TO_FAR, vmin=0, vmax=SHORT, interpolation="nearest")
    last = len(seen) - 1
    axes.set_xticks([0, last], ["key 0", f"{last}"])
    axes.set_yticks([0, last], ["0", f"{last}"])
    axes.set_ylabel("query", labelpad=-8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curve(axes: Axes, seen: Tensor) -> None:
    """Draw the distance that the last query sees by the distance that it has."""
    last = len(seen) - 1
    axes.axhspan(SHORT, 2 * SHORT, color=LIMIT, alpha=0.06, linewidth=0)
    axes.axhline(SHORT, color=LIMIT, linewidth=1)
    axes.plot([0, last], [0, last], color=BEFORE, linewidth=1.4)
    distance = last - torch.arange(last + 1)[:, None].expand(seen[last].shape)
    axes.scatter(distance.numpy(), seen[last].numpy(), s=3, color=AFTER, linewidths=0, zorder=3)
    axes.set(xlim=(0, last), ylim=(-1, 2 * SHORT))
    axes.set_xticks([0, last], ["0", f"{last}"])
    axes.set_yticks([0, SHORT], ["0", f"{SHORT}"])
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------------------
# Pictures


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG with a palette, which is a third of one without."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    content = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(content, "png", optimize=True)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.getvalue())


def draw_one(name: str, method: RopeFreqs | Score) -> Figure:
    """Draw the picture of one method: a plot, or a map and its curve."""
    size = (3.6, 2.5) if isinstance(method, RopeFreqs) else (5.4, 2.6)
    figure = Figure(figsize=size, layout="constrained")
    if isinstance(method, RopeFreqs):
        axes = figure.subplots()
        draw_frequencies(axes, method)
        axes.set_ylabel("tokens a rotation")
    else:
        left, axes = figure.subplots(1, 2)
        seen = distances(method)
        draw_map(left, seen)
        draw_curve(axes, seen)
        query, key = torch.tril_indices(*seen.shape[:2])  # all of them, pale
        everywhere = (query - key)[:, None].expand(-1, seen.shape[-1])
        style = {"s": 2, "color": AFTER, "alpha": 0.08, "linewidths": 0}
        axes.scatter(everywhere.numpy(), seen[query, key].numpy(), **style)
        axes.set_xlabel("distance", labelpad=-6)
        axes.set_ylabel("distance seen", labelpad=2)
    figure.suptitle(name, fontsize=10, fontweight="bold")
    return figure


def draw_small(axes: Axes, score: Score) -> None:
    """Draw the map of a score method, and its curve in the corner."""
    seen = distances(score)
    draw_map(axes, seen)
    axes.set_ylabel("")
    axes.tick_params(labelsize=7)
    curve = axes.inset_axes((0.55, 0.55, 0.45, 0.45))
    draw_curve(curve, seen)
    curve.set(xticks=[], yticks=[])


def draw_strip() -> Figure:
    """Draw three methods: what was trained, other frequencies, other distances."""
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    rope, yarn, rerope = figure.subplots(1, 3)
    draw_frequencies(rope, frequency_examples()["rope"])
    draw_frequencies(yarn, frequency_examples()["yarn"])
    draw_small(rerope, score_examples()["rerope"])
    rope.set_ylabel("tokens a rotation")
    rerope.set_ylabel("query", labelpad=-8)
    for axes, name in zip((rope, yarn, rerope), STRIP, strict=True):
        axes.set_title(name, fontsize=12, fontweight="bold")
        axes.tick_params(labelsize=9)
    return figure


# -------------------------------------------------------------------------------------------------
# The page

HEAD = """# Gallery

<!-- python bench/gallery.py writes this page and its pictures -->

Every method, drawn from what it gives the kernels.

"""
OF_FREQUENCIES = f"""## Frequencies

After how many tokens each pair of dims has rotated once: grey in plain RoPE, blue with the method,
to read {FACTOR:g} times the trained length, which is the red line. A pair above it never makes a
whole rotation in training: at greater distances it meets angles that the model has not seen.
Methods differ in which pairs they slow down. A triangle is a pair that does not rotate at all.

"""
OF_SCORES = f"""## Scores

On the left the distance that each query (downwards) sees of each key (to the right): from yellow,
near, to blue, the trained length of {SHORT} tokens; red is farther than that, grey is not seen. On
the right the same by the true distance: dots for the last query, pale ones for all, a grey line for
plain RoPE. Where pairs of dims see different distances, the map has their mean.

"""
GRID, END = '<div class="methods" markdown="1">\n\n', "</div>\n\n"  # on the site two abreast


def page() -> str:
    """Return docs/gallery.md."""
    parts = [HEAD, OF_FREQUENCIES, GRID]
    parts += [entry("frequencies", methods.METHODS[x], [f"{DIM}"], FREQUENCIES[x])
              for x in methods.METHODS]  # fmt: skip
    parts += [END, OF_SCORES, GRID]
    parts += [entry("scores", scores.SCORES[x], [], SCORES[x]) for x in scores.SCORES]
    return "".join([*parts, END]).rstrip() + "\n"


def entry(axis: str, method: Callable, given: list[str], named: dict[str, Any]) -> str:
    """Return what the page says of a method: its caption, its picture and the call."""
    (what, paper), name = described(method), method.__name__
    for key, value in named.items():
        given = [*given, f"{key}=..." if isinstance(value, list) else f"{key}={value:g}"]
    call = f"{API.get(axis, axis)}.{name}({', '.join(given)})"
    links = f"{link(paper)}, {api_link(axis, method)}"
    text = f"### `{name}`\n\n{what} ({links}).\n\n![{call}](gallery/{name}.png)\n\n`{call}`"
    return f'<div markdown="1">\n\n{text}\n\n</div>\n\n'


if __name__ == "__main__":
    rcParams.update({"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 8})
    save(draw_strip(), DOCS / "strip.png", 160)
    for name, method in (frequency_examples() | score_examples()).items():
        save(draw_one(name, method), DOCS / "gallery" / f"{name}.png", 150)
    (DOCS / "gallery.md").write_text(page(), encoding="utf-8")
