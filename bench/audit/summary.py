"""The audit's table in the README: the usual shapes of every kernel, beside the plain ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from . import report
from .case import CAPABILITIES, Case
from .chips import CARDS
from .entries import all_cases
from .reading import Stretch
from .row import Row

PLAIN = "plain attention"


@dataclass(frozen=True)
class Line:
    """One line of the table: one kernel on every card."""

    title: str
    kernel: str
    variant: str = ""
    dtype: str = "bfloat16"

    @property
    def cases(self) -> list[Case]:
        return [Case(self.kernel, chip, 128, self.dtype, self.variant) for chip in CARDS]


def _attention(name: str, title: str) -> Iterator[Line]:
    yield Line(f"plain attention, {title}", f"{PLAIN} {name}")
    for regions, what in enumerate(("no window", "ReRoPE", "dual chunk"), 1):
        yield Line(f"attention, {title}, {what}", f"attention {name}", f"R{regions}")


LINES = (
    Line("plain copy", "plain copy"),
    Line("rotation, Triton", "rope triton", "halves forward"),
    Line("same, interleaved", "rope triton", "interleaved forward"),
    Line("same, with the angles' gradient", "rope triton", "halves gradient"),
    Line("rotation, CUDA C++", "rope cuda", "halves forward"),
    Line("same, interleaved", "rope cuda", "interleaved forward"),
    Line("same, with the angles' gradient", "rope cuda", "halves gradient"),
    Line("permutation, Triton", "permute rows triton", dtype="int16"),
    Line("permutation, CUDA C++", "permute cuda", "vectors", "int16"),
    Line("merge of two sets, Triton", "merge triton", "two"),
    *_attention("forward", "forward"),
    *_attention("dq", "dQ"),
    *_attention("dkv", "dK and dV"),
    Line("decode, RoPE", "cache decode", "plain paged one-token"),
    Line("decode, ReRoPE", "cache decode", "raw paged one-token"),
    Line("decode, Leaky ReRoPE", "cache decode", "slow paged one-token"),
    Line("decode, ReRoPE, cache in fp8", "cache decode", "raw paged fp8 one-token"),
    Line("linear attention, forward", "linear scan", "forward"),
    Line("linear attention, dQ", "linear scan", "dq"),
    Line("linear attention, dK", "linear scan", "dk"),
    Line("linear attention, dV", "linear scan", "dv"),
)
HEAD = (
    "bfloat16, head_dim 128",
    "registers",
    "stack, bytes",
    "shared, KiB",
    "warps of an SM",
    "widest load, store, bytes",
    "a tile: tensor core instructions",
    "exponentials",
    "all instructions",
    "at least, us",
    "bound by",
)


def table(path: Path) -> str:
    """Markdown from the file that bench/gpu_audit.py wrote."""
    rows = report.load(path)
    found = {line: [rows.get(case) for case in line.cases] for line in LINES}
    lines = [_line(line, its) for line, its in found.items() if None not in its]
    lines = [HEAD, ["---"] * len(HEAD), *lines]
    marked = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_summary(rows)}\n\n{marked}"


def _summary(rows: Mapping[Case, Row]) -> str:
    own = [row for case, row in rows.items() if not report.is_yardstick(case)]
    shipped = [case for case in all_cases() if not report.is_yardstick(case)]
    holding = {str(case): row.stack for case, row in rows.items()
               if row.stack and not report.is_yardstick(case)}  # fmt: skip
    faults = sum(map(bool, report.judge(rows).values()))
    stack = "None holds stack (a spill)"
    if holding:
        each = "; ".join(f"{case}: {size} B" for case, size in sorted(holding.items()))
        stack = f"{len(holding)} hold stack ({each})"
    chips = ", ".join(map(str, CAPABILITIES))
    cards = [f"{card.name} (sm_{card.capability})" for card in CARDS.values()]
    return (
        f"Compiled, not run: {len(own)} of {len(shipped)} configurations for sm_{chips}. "
        f"{stack}; {faults} exceed shared memory, hold more stack than plain attention or move "
        f"rows by less than 16 bytes a thread. Three numbers are those of {', '.join(cards[:-1])} "
        f"and {cards[-1]}, one that of all; every configuration is in "
        "[`gpu_audit.json`](bench/results/gpu_audit.json)."
    )


def _line(line: Line, found: list[Row]) -> list[str]:
    tiles = [tile for row in found if (tile := _tile(line, row)).products]
    return [
        line.title,
        _each(row.registers for row in found),
        _each(row.stack for row in found),
        _each(f"{row.shared / 1024:.0f}" for row in found),
        _each(row.blocks * row.warps for row in found),
        _each(f"{max(row.loads, default=0)}, {max(row.stores, default=0)}" for row in found),
        _each(tile.products for tile in tiles),
        _each(tile.special for tile in tiles),
        _each(tile.instructions for tile in tiles),
        _each(f"{max(row.seconds.values()) * 1e6:.0f}" for row in found),
        _each(row.bound for row in found),
    ]


def _tile(line: Line, row: Row) -> Stretch:
    """One pass of the shortest main loop; of linear attention, with the loop around it, which goes
    from chunk to chunk."""
    found = row.loops[:1] + (row.around,) * line.kernel.startswith("linear")
    return Stretch(*map(sum, zip(*map(astuple, found)))) if found else row.around


def _each(values: Iterable[object]) -> str:
    """The cards' values; one where they agree."""
    texts = list(map(str, values))
    return " / ".join(texts if len(set(texts)) > 1 else texts[:1])
