"""The audit's table in the README: the usual shapes of every kernel, beside the plain ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import report
from .case import CAPABILITIES, Case
from .chips import CARDS
from .entries import all_cases
from .row import Row

PLAIN = "plain attention"


@dataclass(frozen=True)
class Line:
    """One line of the table: one kernel on every chip."""

    title: str
    kernel: str
    variant: str = ""


def _attention(name: str) -> Iterator[Line]:
    yield Line(f"plain attention, {name}", f"{PLAIN} {name}")
    for regions, what in enumerate(("no window", "ReRoPE", "dual chunk"), 1):
        yield Line(f"attention, {name}, {what}", f"attention {name}", f"R{regions}")


LINES = (
    Line("plain copy", "plain copy"),
    Line("rotation, Triton", "rope triton", "halves forward"),
    Line("same, interleaved", "rope triton", "interleaved forward"),
    Line("same, with the angles' gradient", "rope triton", "halves gradient"),
    Line("rotation, CUDA C++", "rope cuda", "halves forward"),
    Line("same, interleaved", "rope cuda", "interleaved forward"),
    Line("same, with the angles' gradient", "rope cuda", "halves gradient"),
    *_attention("forward"),
    *_attention("dq"),
    *_attention("dkv"),
    Line("decode, ReRoPE", "cache decode", "raw paged one-token"),
    Line("decode, Leaky ReRoPE", "cache decode", "slow paged one-token"),
)
HEAD = (
    "bfloat16, head_dim 128",
    "registers, sm_" + " / ".join(map(str, CAPABILITIES)),
    "warps of an SM",
    "a tile: products, exponentials, instructions on sm_80; 90; 100",
    "at least, us: " + " / ".join(card.name for card in CARDS.values()),
    "bound by",
)


def table(path: Path) -> str:
    """Markdown from the file that bench/gpu_audit.py wrote."""
    rows = report.load(path)
    known = {(case.kernel, case.variant) for case in rows}
    lines = [_line(rows, line) for line in LINES if (line.kernel, line.variant) in known]
    lines = [HEAD, ["---"] * len(HEAD), *lines]
    marked = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_summary(rows)}\n\n{marked}"


def _summary(rows: Mapping[Case, Row]) -> str:
    own = [row for case, row in rows.items() if not report.is_yardstick(case)]
    shipped = [case for case in all_cases() if not report.is_yardstick(case)]
    holding = [row for row in own if row.stack]
    faults = sum(map(bool, report.judge(rows).values()))
    stack = "None holds stack (a spill)"
    if holding:
        kernels = sorted({f"{row.kernel}, {row.dtype}" for row in holding})
        stack = f"{len(holding)} hold stack ({'; '.join(kernels)})"
    chips = ", ".join(map(str, CAPABILITIES))
    return (
        f"Compiled, not run: {len(own)} of {len(shipped)} configurations for sm_{chips}. "
        f"{stack}; {faults} exceed shared memory, hold more stack than plain attention or move "
        "rows by less than 16 bytes a thread."
    )


def _line(rows: Mapping[Case, Row], line: Line) -> list[str]:
    found = {chip: rows.get(_case(line, chip)) for chip in CAPABILITIES}
    with_card = [found[chip] for chip in CARDS]
    bounds = dict.fromkeys(row.bound for row in with_card if row)
    return [
        line.title,
        " / ".join(str(row.registers) if row else "-" for row in found.values()),
        " / ".join(str(row.blocks * row.warps) if row else "-" for row in found.values()),
        "; ".join(_tile(row) for row in with_card),
        " / ".join(f"{max(row.seconds.values()) * 1e6:.0f}" if row else "-" for row in with_card),
        ", ".join(bounds),
    ]


def _case(line: Line, chip: int) -> Case:
    return Case(line.kernel, chip, 128, "bfloat16", line.variant)


def _tile(row: Row | None) -> str:
    """The loop of the whole tiles: the shortest."""
    if row is None or not row.loops or not row.loops[0].products:
        return "-"
    loop = row.loops[0]
    return f"{loop.products}, {loop.special}, {loop.instructions}"
