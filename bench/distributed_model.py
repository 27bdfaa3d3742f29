"""Compute the cost of sharding a sequence over many GPUs: python bench/distributed_model.py

A layer's attention over 8 to 256 GPUs and 128k to 10M tokens by each strategy: its time, from
arithmetic and bytes sent, and the memory in transit. Nothing is measured. Prints the table and
writes docs/context_parallel.svg: for each case the simplest strategy within 2 % of the fastest,
among those that fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from harness import table

FLOPS = 400e12  # of a GPU's attention, in 16 bits
NVLINK, FABRIC = 450e9, 50e9  # bytes a second that a GPU sends: in a node, and 400 Gb/s out of it
NODE = 8  # GPUs
HEADS_Q, HEADS_K, HEAD_DIM, WIDTH, WIDE = 32, 8, 128, 2, 4  # bfloat16, and sums in float32
PARTS = 8  # parts of the heads, sent one after the other
BACKWARD = 2.5  # of the forward's arithmetic
FITS = 10e9  # bytes that may be in transit
CLOSE = 1.02
GPUS = (8, 16, 32, 64, 128, 256)
TOKENS = (*(1 << n for n in range(17, 23)), 10 << 20)
DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Cost:
    """A layer's cost on every GPU: seconds, and bytes beside q, k, v, out and their gradients."""

    forward: float
    backward: float
    under_way: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def alone(gpus: int, tokens: int) -> Cost:
    """Return attention's cost without sending: causal, so half of all pairs."""
    forward = 2 * tokens**2 * HEADS_Q * HEAD_DIM / gpus / FLOPS
    return Cost(forward, BACKWARD * forward, 0.0)


def keys(tokens: int, width: int = WIDTH) -> float:
    """Return the bytes of all keys and values."""
    return 2 * tokens * HEADS_K * HEAD_DIM * width


def gather(gpus: int, tokens: int) -> Cost:
    """Cost a gather, which waits for the first part's keys and the last part's gradients."""
    work, speed = alone(gpus, tokens), _speed(gpus)
    others = (gpus - 1) / gpus
    ours, sums = others * keys(tokens) / speed, others * keys(tokens, WIDE) / speed
    forward = max(work.forward + ours / PARTS, ours)
    backward = max(work.backward + (ours + sums) / PARTS, ours + sums)
    return Cost(forward, backward, (2 * keys(tokens) + 2 * keys(tokens, WIDE)) / PARTS)


def ring(gpus: int, tokens: int) -> Cost:
    """Cost a ring: the next keys hide behind arithmetic, the gradients' last step does not."""
    work, speed = alone(gpus, tokens), _speed(gpus)
    ours = (gpus - 1) / gpus * keys(tokens) / speed
    home = keys(tokens, WIDE) / gpus / speed
    forward = max(work.forward, ours)
    backward = max(work.backward + home, ours + keys(tokens, WIDE) / speed)
    return Cost(forward, backward, 2 * (keys(tokens) + keys(tokens, WIDE)) / gpus / PARTS)


def ulysses(gpus: int, tokens: int) -> Cost:
    """Cost Ulysses: tokens for heads, before and after attention; infinite past q's heads."""
    if gpus > HEADS_Q:
        return Cost(math.inf, math.inf, math.inf)
    work, heads_k = alone(gpus, tokens), max(HEADS_K, gpus)  # every GPU has a key head
    rows = tokens * 2 * (HEADS_Q + heads_k) * HEAD_DIM * WIDTH / gpus
    exchange = (gpus - 1) / gpus * rows / _speed(gpus)
    return Cost(work.forward + exchange, work.backward + exchange, rows)


STRATEGIES = {"gather": gather, "ring": ring, "ulysses": ulysses}


def choice(gpus: int, tokens: int) -> tuple[str, Cost]:
    """Choose the simplest strategy among those that fit and are close to the fastest."""
    costs = {name: cost(gpus, tokens) for name, cost in STRATEGIES.items()}
    fit = {name: cost for name, cost in costs.items() if cost.under_way <= FITS}
    fastest = min((cost.seconds for cost in fit.values()), default=math.inf)
    return next((n, cost) for n, cost in fit.items() if cost.seconds <= CLOSE * fastest)


def _speed(gpus: int) -> float:
    return NVLINK if gpus <= NODE else FABRIC


def named(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def in_words(cost: Cost) -> str:
    if cost.seconds == math.inf:
        return ""
    times = f"{cost.forward * 1e3:.1f} / {cost.backward * 1e3:.1f}"
    return f"{times}, {cost.under_way / 1e9:.1f} GB" if cost.under_way else times


def cases() -> str:
    """Make the table: a layer's forward / backward in ms, and its GB in transit."""
    rows = []
    for tokens, gpus in product(TOKENS, GPUS):
        costs = [alone(gpus, tokens), *(cost(gpus, tokens) for cost in STRATEGIES.values())]
        rows.append([named(tokens), str(gpus), *map(in_words, costs), choice(gpus, tokens)[0]])
    return table(["tokens", "GPUs", "attention alone", *STRATEGIES, "choose"], rows)


def plot(path: Path) -> None:
    """Draw a cell for each case: the strategy's color, and its time over attention's."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "context parallel"  # the same file every time
    from matplotlib import pyplot
    from matplotlib.patches import Patch, Rectangle

    colors = dict(zip(STRATEGIES, ("#9ecae1", "#fdae6b", "#a1d99b"), strict=True))
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (row, tokens), (column, gpus) in product(enumerate(TOKENS), enumerate(GPUS)):
        name, cost = choice(gpus, tokens)
        more = cost.seconds / alone(gpus, tokens).seconds - 1
        look = {"facecolor": colors[name], "edgecolor": "white"}
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))
        axes.text(column, row, f"+{more:.0%}", ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.5, len(GPUS) - 0.5), ylim=(-0.5, len(TOKENS) - 0.5))
    axes.set(xlabel="GPUs", ylabel="tokens")
    axes.set_xticks(range(len(GPUS)), GPUS)
    axes.set_yticks(range(len(TOKENS)), [named(tokens) for tokens in TOKENS])
    axes.set_title("Computed: what to choose, and its cost over attention alone", fontsize=10)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    print(cases())
    plot(DOCS / "context_parallel.svg")


if __name__ == "__main__":
    main()
