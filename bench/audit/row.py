"""One line of the audit: what a binary needs and does, how long that takes at least, its faults."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from . import sass
from .case import Binary, Case, Traffic
from .chips import CARDS, CHIPS, WARP, Work


@dataclass(frozen=True)
class Loop:
    """One innermost loop; instructions of a warp in one pass."""

    instructions: int
    products: int
    special: int


@dataclass(frozen=True)
class Row:
    kernel: str
    capability: int
    head_dim: int
    dtype: str
    variant: str
    registers: int
    stack: int
    shared: int
    warps: int  # of a block
    blocks: int  # resident on an SM
    loads: Mapping[int, int]  # instructions by bytes of a thread's access, global memory
    stores: Mapping[int, int]
    loops: tuple[Loop, ...]  # the main ones first: those with products, else with loads
    seconds: Mapping[str, float]  # by resource; empty where no card has this chip
    narrow: bool  # a row moved by less than 16 bytes a thread
    digest: str  # of the machine code

    @property
    def case(self) -> Case:
        return Case(self.kernel, self.capability, self.head_dim, self.dtype, self.variant)

    @property
    def occupancy(self) -> float:
        return self.blocks * self.warps / CHIPS[self.capability].warps

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


def row(case: Case, binary: Binary, traffic: Traffic) -> Row:
    chip = CHIPS[case.capability]
    whole, loops = sass.whole(binary.sass), sass.loops(binary.sass)
    main = _main(loops)
    card = CARDS.get(case.capability)
    work = _work(binary, traffic, whole, loops, main)
    return Row(
        case.kernel,
        case.capability,
        case.head_dim,
        case.dtype,
        case.variant,
        binary.registers,
        binary.stack + binary.local,
        binary.shared,
        binary.warps,
        chip.residence(binary),
        dict(sorted(whole.loads.items())),
        dict(sorted(whole.stores.items())),
        tuple(Loop(x.instructions, x.products, x.special) for x in main),
        card.seconds(work) if card else {},
        _narrow(binary, traffic, whole, main),
        hashlib.sha256(binary.sass.encode()).hexdigest()[:10],
    )


def faults(row: Row, plain: Row | None, holds_stack: bool) -> list[str]:
    """What must not be. With `holds_stack`, the stack of the plain kernel of the tile may."""
    allowed = plain.stack if plain is not None and holds_stack else 0
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


def _main(loops: list[sass.Count]) -> list[sass.Count]:
    """The loops that do the work, shortest first: those with products, else with wide loads."""
    found = [x for x in loops if x.products] or [x for x in loops if x.wide_bytes("loads")]
    return sorted(found, key=lambda x: x.instructions)


def _work(binary: Binary, traffic: Traffic, whole, loops, main) -> Work:
    """Instructions of all warps: those outside loops once, those of main loops as often as said."""

    def total(field: str) -> float:
        outside = getattr(whole, field) - sum(getattr(x, field) for x in loops)
        inside = sum(n * getattr(x, field) for n, x in zip(traffic.passes, main))
        return binary.warps * (traffic.blocks * outside + inside)

    operations = sum(traffic.passes) * traffic.operations if main and main[0].products else 0.0
    return Work(traffic.bytes, operations, total("special"), total("instructions"))


def _narrow(binary: Binary, traffic: Traffic, whole: sass.Count, main) -> bool:
    """Do fewer bytes move by 16 than the rows have? Rows too small for all threads may."""
    threads = binary.warps * WARP

    def short(count: sass.Count, kind: str, rows: float) -> bool:
        return (
            count.wide_bytes(kind) * threads < rows // (threads * sass.WIDE) * threads * sass.WIDE
        )

    return any(short(x, "loads", traffic.loaded) for x in main or [whole]) or short(
        whole, "stores", traffic.stored
    )
