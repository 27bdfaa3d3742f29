"""Attention of a sequence over 2 and 4 processes: python bench/bench_distributed.py

It compares the CPU seconds of all ranks with one process of as many threads, and the most that a
rank's tensors take with those of one process divided by the ranks: see docs/benchmarks.md. Past the
first length queries see 2,048 keys (a sliding window), which changes no tensor's size.
"""

from __future__ import annotations

import os
import sys
import time
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # peaks are of the CPU's memory, which gloo uses
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from harness import NAN, Report, arguments, column, peak_megabytes, returned_memory, verdict
from support.held import Held
from support.ranks import Ranks

from extrope_kernels import distributed, methods, rope_attention, scores

HEADS_Q, HEADS_K, HEAD_DIM, WINDOW, SEEN = 32, 8, 64, 1024, 2048
STRATEGIES = ("gather", "ring", "ulysses")
CPU_BAR, MEMORY_BAR = 1.10, 1.15


@dataclass
class Row:
    """One strategy; one process has its own row, with ranks as its threads."""

    name: str = column()
    ranks: int = column("P")
    seqlen: int = column("tokens")
    # Of CPU, of all ranks, the best of the repeats; forward with backward.
    milliseconds: float = column("CPU ms", ".0f")
    of_one: float = column("of one process's", ".2f", NAN)  # with as many threads
    held: float = column("MB held", ".1f", NAN)  # by the rank with most tensors, beside its q, k, v
    of_share: float = column("of one's / P", ".2f", NAN)
    megabytes: float = column("peak MB", ".1f", NAN)  # of the process
    windowed: bool = False

    @property
    def verdict(self) -> str:
        # A window leaves little work beside copying and sending: those rows are about memory.
        bars = [] if self.windowed else [verdict(self.of_one, CPU_BAR)]
        bars += [verdict(self.of_share, MEMORY_BAR)] * (self.name == "ring")
        return "missed" if "missed" in bars else max(bars, default="")


class Measured(NamedTuple):
    """Measurements of one rank."""

    seconds: float  # of CPU
    megabytes: float  # the process's peak
    held: int  # bytes


def measure(mesh, strategy: str, seqlen: int, seen: int | None, repeats: int, threads: int):
    """Measure forward with backward on every rank, with its tokens of a sequence of seqlen."""
    torch.set_num_threads(threads)
    shape = [1, seqlen // (1 if mesh is None else mesh.size())]
    heads = (HEADS_Q, HEADS_K, HEADS_K)
    leaves = [torch.randn(*shape, n, HEAD_DIM, requires_grad=True) for n in heads]
    dout, freqs = torch.randn_like(leaves[0]), methods.rope(HEAD_DIM)
    attention, options = rope_attention, {"sliding_window": seen}
    if mesh is not None:
        attention = distributed.rope_attention
        options |= {"mesh": mesh, "strategy": strategy}

    def train() -> None:
        out = attention(*leaves, freqs, scores.rerope(WINDOW), **options)
        torch.autograd.grad(out, leaves, dout)

    with Held() as held:
        train()
    seconds = min(timeit.repeat(train, timer=time.process_time, number=1, repeat=repeats))
    with returned_memory():
        megabytes = peak_megabytes(train)
    torch.set_num_threads(1)
    return Measured(seconds, megabytes, held.most)


def bench(report: Report, ranks: Ranks, seqlen: int, size: int, seen: int | None) -> None:
    given = {"seqlen": seqlen, "seen": seen, "repeats": report.args.repeats}
    (one,) = ranks.run(measure, 1, strategy="", threads=size, **given)
    alone = {"held": one.held / 1e6, "megabytes": one.megabytes}
    report.add(Row("one process", size, seqlen, one.seconds * 1e3, **alone))
    for strategy in STRATEGIES:
        found = ranks.run(measure, size, strategy=strategy, threads=1, **given)
        seconds, held = sum(x.seconds for x in found), max(x.held for x in found)
        report.add(
            Row(strategy, size, seqlen, seconds * 1e3, of_one=seconds / one.seconds,
                held=held / 1e6, of_share=held / (one.held / size),
                megabytes=max(x.megabytes for x in found), windowed=seen is not None)
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    args.repeats = min(args.repeats, 2)
    report = Report("distributed", args, about="forward with backward, 32 heads and 8")
    ranks = Ranks(seconds=3600)
    lengths = {64: None} if args.quick else {16384: None, 32768: SEEN, 65536: SEEN}
    try:
        for seqlen, seen in lengths.items():
            for size in (2, 4):
                bench(report, ranks, seqlen, size, seen)
                report.save()  # the next takes minutes
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
