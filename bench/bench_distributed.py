"""Attention of a sequence over 2 and 4 processes: python bench/bench_distributed.py

It compares each rank's sent bytes with the formula (they must be equal), the CPU seconds of all
ranks with one process of as many threads, and the most that a rank's tensors take with those of one
process divided by the ranks. The peak of its memory also has messages that gloo's threads free
late. gloo runs on one machine, a thread per rank: times show the work, not a network. Past the
first length queries see 2,048 keys (a sliding window), which changes no tensor's size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import NAN, Report, arguments, peak_megabytes, returned_memory, verdict
from held import Held
from ranks import Ranks
from sent import Sent, by_formula
from torch.distributed.device_mesh import DeviceMesh

from extrope_kernels import RopeFreqs, distributed, methods, rope_attention, scores

HEADS_Q, HEADS_K, HEAD_DIM, WINDOW, SEEN = 32, 8, 64, 1024, 2048
STRATEGIES = ("gather", "ring", "ulysses")
CPU_BAR, MEMORY_BAR = 1.10, 1.15


@dataclass
class Row:
    """One strategy; one process has its own row, with ranks as its threads."""

    name: str
    ranks: int
    seqlen: int
    milliseconds: float  # of CPU, of all ranks, best of the repeats; forward with backward
    of_one: float = NAN  # over that of one process with as many threads
    sent: float = NAN  # MB a rank sends, forward with backward
    formula: float = NAN
    written: float = NAN  # MB that the process wrote meanwhile, to sockets
    held: float = NAN  # MB of tensors, of the rank that holds most, beside its q, k and v
    of_share: float = NAN  # over that of one process divided by ranks
    megabytes: float = NAN  # peak of the process
    windowed: bool = False

    @property
    def verdict(self) -> str:
        if self.sent != self.formula and self.name != "one process":
            return "missed"
        # A window leaves little work beside copying and sending: those rows are about memory.
        bars = [] if self.windowed else [verdict(self.of_one, CPU_BAR)]
        bars += [verdict(self.of_share, MEMORY_BAR)] * (self.name == "ring")
        return "missed" if "missed" in bars else max(bars, default="")


COLUMNS = {
    "name": ("", 14, ""),
    "ranks": ("P", 3, ""),
    "seqlen": ("tokens", 7, ""),
    "milliseconds": ("CPU ms", 9, ".0f"),
    "of_one": ("of one process's", 16, ".2f"),
    "sent": ("MB sent", 9, ".3f"),
    "formula": ("by formula", 10, ".3f"),
    "written": ("to sockets", 10, ".3f"),
    "held": ("MB held", 8, ".1f"),
    "of_share": ("of one's / P", 12, ".2f"),
    "megabytes": ("peak MB", 8, ".1f"),
    "verdict": ("", 6, ""),
}


@dataclass
class Measured:
    """Measurements of one rank."""

    seconds: float = NAN
    megabytes: float = NAN
    held: int = 0
    sent: int = 0
    formula: int = 0
    written: int = 0  # bytes that the process wrote, to sockets too


def tensors(seqlen: int) -> list[torch.Tensor]:
    return [torch.randn(1, seqlen, h, HEAD_DIM) for h in (HEADS_Q, HEADS_K, HEADS_K)]


def measure(
    mesh: DeviceMesh | None,
    strategy: str,
    seqlen: int,
    seen: int | None,
    repeats: int,
    threads: int,
) -> Measured:
    """Measure forward with backward on every rank, with its tokens of a sequence of seqlen."""
    torch.set_num_threads(threads)
    ranks = 1 if mesh is None else mesh.size()
    leaves = [x.requires_grad_() for x in tensors(seqlen // ranks)]
    dout, freqs = torch.randn_like(leaves[0]), RopeFreqs(methods.rope(HEAD_DIM).inv_freq)
    score, options = scores.rerope(WINDOW), {"sliding_window": seen}

    def train() -> None:
        if mesh is None:
            out = rope_attention(*leaves, freqs, score, **options)
        else:
            options.update(mesh=mesh, strategy=strategy)
            out = distributed.rope_attention(*leaves, freqs, score, **options)
        torch.autograd.grad(out, leaves, dout)

    found = Measured()
    rank, before = 0 if mesh is None else mesh.get_local_rank(), bytes_written()
    with Held() as held, Sent(rank, ranks) as sent:
        train()
    found.held, found.sent, found.written = held.most, sent.bytes, bytes_written() - before
    found.formula = by_formula(strategy, *leaves, ranks, backward=True)
    found.seconds = min(seconds_of(train) for _ in range(repeats))
    with returned_memory():
        found.megabytes = peak_megabytes(train)
    torch.set_num_threads(1)
    return found


def seconds_of(train) -> float:
    start = time.process_time()
    train()
    return time.process_time() - start


def bytes_written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def bench(report: Report, ranks: Ranks, seqlen: int, size: int, seen: int | None) -> None:
    given = {"seqlen": seqlen, "seen": seen, "repeats": report.args.repeats}
    (one,) = ranks.run(measure, 1, strategy="", threads=size, **given)
    times = one.seconds * 1e3
    report.add(
        Row("one process", size, seqlen, times, held=one.held / 1e6, megabytes=one.megabytes)
    )
    for strategy in STRATEGIES:
        found = ranks.run(measure, size, strategy=strategy, threads=1, **given)
        seconds, most = sum(x.seconds for x in found), max(x.held for x in found)
        report.add(
            Row(
                strategy,
                size,
                seqlen,
                seconds * 1e3,
                seconds / one.seconds,
                max(x.sent for x in found) / 1e6,
                max(x.formula for x in found) / 1e6,
                max(x.written for x in found) / 1e6,
                most / 1e6,
                most / (one.held / size),
                max(x.megabytes for x in found),
                windowed=seen is not None,
            )
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    args.repeats = min(args.repeats, 2)
    report = Report("distributed", args, COLUMNS, about="forward with backward, 32 heads and 8")
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
