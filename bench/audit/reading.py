"""What the audit reads from a binary, once: all else follows from it without compiling again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import sass
from .case import Binary, Case


@dataclass(frozen=True)
class Stretch:
    """A stretch of machine code: instructions of a warp that goes through it once."""

    instructions: int
    products: int
    special: int
    wide: int  # bytes that a thread loads from global memory by 16 or more


@dataclass(frozen=True)
class Code:
    """What a case compiled to, as far as the audit wants it."""

    kernel: str
    capability: int
    head_dim: int
    dtype: str
    variant: str
    registers: int
    stack: int
    shared: int
    warps: int  # of a block
    tensor_memory: int
    loads: Mapping[int, int]  # instructions by bytes of a thread's access, global memory
    stores: Mapping[int, int]
    outside: Stretch  # all that is in no loop
    around: Stretch  # loops that hold others, without these
    loops: tuple[Stretch, ...]  # the main ones, the shortest first
    digest: str  # of the machine code
    made_from: str  # a hash of what the compiler was given, and of its version

    @property
    def case(self) -> Case:
        return Case(self.kernel, self.capability, self.head_dim, self.dtype, self.variant)


def read(case: Case, binary: Binary, made_from: str) -> Code:
    whole, (loops, around) = sass.whole(binary.sass), sass.loops(binary.sass)
    inside = [sum(column) for column in zip(*map(_fields, [*loops, around]))]
    return Code(
        kernel=case.kernel,
        capability=case.capability,
        head_dim=case.head_dim,
        dtype=case.dtype,
        variant=case.variant,
        registers=binary.registers,
        stack=binary.stack + binary.local,
        shared=binary.shared,
        warps=binary.warps,
        tensor_memory=binary.tensor_memory,
        loads=dict(sorted(whole.loads.items())),
        stores=dict(sorted(whole.stores.items())),
        outside=Stretch(*(all_ - some for all_, some in zip(_fields(whole), inside))),
        around=Stretch(*_fields(around)),
        loops=tuple(Stretch(*_fields(loop)) for loop in _main(loops)),
        digest=hashlib.sha256(binary.sass.encode()).hexdigest()[:10],
        made_from=made_from,
    )


def reader() -> str:
    """A hash of how binaries are read: another reading has to see them again."""
    files = (Path(__file__), Path(sass.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _fields(count: sass.Count) -> tuple[int, int, int, int]:
    return count.instructions, count.products, count.special, sass.wide_bytes(count.loads)


def _main(loops: list[sass.Count]) -> list[sass.Count]:
    """The loops that do the work, shortest first: with products; or wide loads; or any loads."""

    def wide(loop: sass.Count) -> int:
        return sass.wide_bytes(loop.loads)

    for has in (lambda loop: loop.products, wide, lambda loop: loop.loads):
        if found := list(filter(has, loops)):
            return sorted(found, key=lambda loop: loop.instructions)
    return []
