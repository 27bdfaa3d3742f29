"""Machine code: instructions, loops, widths of accesses, products, special functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?(?:`\((\.L_\w+)\)|\b(0x[0-9a-f]+))")
_ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/")
_GLOBAL_LOADS = ("LDG", "LDGSTS")
_PRODUCTS = re.compile(r"(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)\b")
WIDE = 16  # bytes of the widest access of one thread that all chips have


@dataclass(frozen=True)
class Count:
    """What a stretch of machine code holds, counted once a warp."""

    instructions: int
    products: int
    special: int  # MUFU: exponentials, reciprocals, ...
    loads: Counter[int]  # from global memory, by bytes of a thread's access
    stores: Counter[int]


def wide_bytes(accesses: Mapping[int, int]) -> int:
    """Bytes that a thread moves in accesses of 16 bytes or more; how many there are by size."""
    return sum(size * n for size, n in accesses.items() if size >= WIDE)


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, line) of every instruction."""
    found = []
    for line in sass.splitlines():
        if match := _INSTRUCTION.search(line):
            found.append((int(_ADDRESS.search(line)[1], 16), match[1], line))
    return found


def count(opcodes: list[str]) -> Count:
    loads, stores = Counter(), Counter()
    products = special = total = 0
    for opcode in opcodes:
        name = opcode.split(".")[0]
        total += name != "NOP"
        if name in _GLOBAL_LOADS:
            loads[_width(opcode)] += 1
        elif name == "STG":
            stores[_width(opcode)] += 1
        elif name == "MUFU":
            special += 1
        elif _PRODUCTS.match(name):
            products += 1
    return Count(total, products, special, loads, stores)


def loops(sass: str) -> tuple[list[Count], Count]:
    """Every loop that holds no other, in order: what a branch back encloses. And what lies around
    them, in loops that hold others."""
    code = instructions(sass)
    opcodes = [opcode for _, opcode, _ in code]
    spans = _spans(sass, code)
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    inside, within = (
        {i for start, end in some for i in range(start, end + 1)} for some in (inner, spans)
    )
    around = [opcodes[i] for i in sorted(within - inside)]
    return [count(opcodes[start : end + 1]) for start, end in inner], count(around)


def _spans(sass: str, code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """The first and last instruction of every loop."""
    targets = _targets(sass, code)
    spans = []
    for end, (_, opcode, line) in enumerate(code):
        branch = _BRANCH.search(line) if opcode.split(".")[0] == "BRA" else None
        start = targets.get(branch[1] or int(branch[2], 16)) if branch else None
        # One instruction that jumps to itself ends every kernel.
        if start is not None and start < end:
            spans.append((start, end))
    return spans


def whole(sass: str) -> Count:
    return count([opcode for _, opcode, _ in instructions(sass)])


def _targets(sass: str, code: list[tuple[int, str, str]]) -> dict[str | int, int]:
    """Where branches go: indices of instructions by label (nvdisasm) and address (cuobjdump)."""
    targets: dict[str | int, int] = {address: i for i, (address, _, _) in enumerate(code)}
    index = 0
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            targets[label[1]] = index
        index += bool(_INSTRUCTION.search(line))
    return targets


def _width(opcode: str) -> int:
    """Bytes of one thread's access."""
    fields = opcode.split(".")
    for field, size in (("256", 32), ("128", 16), ("64", 8)):
        if field in fields:
            return size
    if any(field in ("U16", "S16") for field in fields):
        return 2
    return 1 if any(field in ("U8", "S8") for field in fields) else 4
