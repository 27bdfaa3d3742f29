"""One line of the audit: what a binary needs and does, how long that takes at least, its faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from . import sass
from .case import Traffic
from .chips import CARDS, CHIPS, WARP, Work
from .reading import Code

# mma.sync multiplies 16 x 16 by 16 x 8 in 16 bits; a warp's share of wgmma or tcgen05 is larger.
OPERATIONS_OF_A_WARP = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Row(Code):
    """What follows from the code for a launch of it on the chip."""

    blocks: int  # resident on an SM
    seconds: Mapping[str, float]  # by resource; empty where no card has this chip
    narrow: bool  # a row moved by less than 16 bytes a thread

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


def row(code: Code, traffic: Traffic) -> Row:
    """`code` may be a row, whose other fields are then found anew."""
    known = {field.name: getattr(code, field.name) for field in fields(Code)}
    card = CARDS.get(code.capability)
    return Row(
        **known,
        blocks=CHIPS[code.capability].residence(code),
        seconds=card.seconds(_work(code, traffic)) if card else {},
        narrow=_narrow(code, traffic),
    )


def faults(row: Row, plain: Row | None, holds_stack: bool, allowed: int = 0) -> list[str]:
    """What must not be. `allowed` bytes of stack may, with `holds_stack` those of the plain kernel
    of the tile.
    """
    allowed = max(allowed, plain.stack if plain is not None and holds_stack else 0)
    limit = CHIPS[row.capability].block_shared
    found = []
    if row.stack > allowed:
        found.append(f"{row.stack} bytes of stack, allowed are {allowed}")
    if row.shared > limit:
        found.append(f"{row.shared} bytes of shared memory, the chip has {limit}")
    if row.blocks == 0:
        found.append("no block fits an SM")
    if row.narrow:
        found.append(f"rows move by less than 16 bytes: loads {row.loads}, stores {row.stores}")
    return found


def _work(code: Code, traffic: Traffic) -> Work:
    """Instructions of all warps: those outside loops once, those of main loops, and around them, as
    often as said."""

    def total(field: str) -> float:
        inside = sum(n * getattr(x, field) for n, x in zip(traffic.passes, code.loops))
        around = max(traffic.around, traffic.blocks) * getattr(code.around, field)
        return code.warps * (traffic.blocks * getattr(code.outside, field) + around + inside)

    multiplies = any(loop.products for loop in code.loops)
    operations = sum(traffic.passes) * traffic.operations if multiplies else 0.0
    return Work(
        traffic.bytes,
        operations,
        total("special"),
        total("instructions"),
        by_warps=operations > 0 and _by_warps(code, traffic),
    )


def _by_warps(code: Code, traffic: Traffic) -> bool:
    """Whether a tile's products are those of single warps: then each does m16n8k16, no more."""
    return traffic.operations <= code.warps * code.loops[0].products * OPERATIONS_OF_A_WARP


def _narrow(code: Code, traffic: Traffic) -> bool:
    """Do fewer bytes move by 16 than the rows have? Rows too small for all threads may."""
    threads = code.warps * WARP

    def short(wide: int, rows: float) -> bool:
        return wide * threads < rows // (threads * sass.WIDE) * threads * sass.WIDE

    loaded = [loop.wide for loop in code.loops] or [sass.wide_bytes(code.loads)]
    stored = sass.wide_bytes(code.stores)
    return any(short(wide, traffic.loaded) for wide in loaded) or short(stored, traffic.stored)
