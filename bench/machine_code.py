"""Read a GPU binary's resources and instructions, and bound its time on a card.

Bound: the longest of four times, of memory, tensor cores, special functions and instruction issue,
if each were always busy. Limits of a processor (SM): CUDA C++ Programming Guide, appendix Compute
Capabilities. Peaks: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM and HGX B200, dense; at each
clock SMs times a tensor core's operations a cycle give that peak. On sm_90 only wgmma reaches it:
products of one warp (mma.sync) came to 62.9% of it on average in
https://arxiv.org/abs/2402.13499. For sm_100 no such figure is known.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

WARP = 32
REGISTERS, REGISTER_UNIT = 65_536, 256  # of an SM; given to a warp in such units
SHARED_RESERVED = 1024  # bytes of each block, for the system
TENSOR_COLUMNS = 512  # of an SM's tensor memory, if it has one
SCHEDULERS = 4  # of an SM; each issues one instruction a cycle
SPECIAL_LANES = 16  # exponentials and the like of an SM a cycle
# mma.sync multiplies 16 x 16 by 16 x 8 in 16 bits; a warp's share of wgmma or tcgen05 is larger.
OPERATIONS_OF_A_WARP = 2 * 16 * 8 * 16
WIDE = 16  # bytes of the widest access of one thread that all chips have


# -------------------------------------------------------------------------------------------------
# Chips and cards


@dataclass(frozen=True)
class Chip:
    """Limits of one compute capability."""

    block_shared: int  # bytes that one block may use
    shared: int  # bytes of an SM
    warps: int  # resident on an SM
    blocks: int


CHIPS = {
    80: Chip(block_shared=166_912, shared=167_936, warps=64, blocks=32),
    86: Chip(block_shared=101_376, shared=102_400, warps=48, blocks=16),
    89: Chip(block_shared=101_376, shared=102_400, warps=48, blocks=24),
    90: Chip(block_shared=232_448, shared=233_472, warps=64, blocks=32),
    100: Chip(block_shared=232_448, shared=233_472, warps=64, blocks=32),
    120: Chip(block_shared=101_376, shared=102_400, warps=48, blocks=24),
}

# AMD's: bytes of shared memory (LDS) that one block may use.
AMD_SHARED = {
    "gfx90a": 65_536,  # MI200
    "gfx942": 65_536,  # MI300
    "gfx950": 163_840,  # MI350
    "gfx1100": 65_536,  # RX 7900
    "gfx1201": 65_536,  # RX 9070
}


@dataclass(frozen=True)
class Card:
    """Peaks of a card, per second."""

    name: str
    capability: int
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes
    tensor: float  # operations in bfloat16 and float16, sums in float32
    of_a_warp: float = 1.0  # the share of that rate for products of one warp (mma.sync)


CARDS = {
    card.capability: card
    for card in (
        Card("A100", 80, processors=108, clock=1.41e9, bandwidth=2.039e12, tensor=312e12),
        Card("H100", 90, 132, clock=1.83e9, bandwidth=3.35e12, tensor=989.4e12, of_a_warp=0.629),
        Card("B200", 100, processors=148, clock=1.86e9, bandwidth=8.0e12, tensor=2250e12),
    )
}


# -------------------------------------------------------------------------------------------------
# Machine code


@dataclass(frozen=True)
class Stretch:
    """A stretch of machine code, with counts for a warp that executes it once."""

    instructions: int
    products: int
    special: int  # MUFU: exponentials, reciprocals, ...
    loads: Counter[int]  # from global memory, by bytes of a thread's access
    stores: Counter[int]


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    registers: int
    stack: int  # bytes of a thread: spills and local arrays
    shared: int  # bytes of a block, static and dynamic
    warps: int  # of a block
    tensor_memory: int  # columns of a block, on chips that keep products' sums there
    loads: Counter[int]
    stores: Counter[int]
    outside: Stretch  # code outside of loops
    around: Stretch  # loops that hold others, without these
    loops: tuple[Stretch, ...]  # the main ones, the shortest first

    def resident(self, chip: Chip) -> int:
        """Return the number of its blocks that an SM holds at a time."""
        per_warp = -(-self.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // self.warps if self.registers else chip.blocks
        by_shared = chip.shared // (self.shared + SHARED_RESERVED)
        columns = self.tensor_memory
        by_columns = TENSOR_COLUMNS // columns if columns else chip.blocks
        return min(by_registers, by_shared, by_columns, chip.warps // self.warps, chip.blocks)


def read(cubin: bytes, tools: Path, *, warps: int, shared: int = 0, tensor_memory: int = 0) -> Code:
    """Read a binary of one kernel with cuobjdump and nvdisasm, which come with Triton."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run(tools / "cuobjdump", "--dump-resource-usage", path)
        sass = run(tools / "nvdisasm", "-c", path)
    return code_of(usage, sass, warps=warps, shared=shared, tensor_memory=tensor_memory)


def amd_resources(binary: bytes) -> tuple[int, int]:
    """Return the vector registers and the bytes of stack of a thread, from the binary's notes."""

    def number(name: bytes) -> int:
        """Read the MessagePack integer after a key."""
        kind, *rest = binary.split(name, 1)[1][:5]
        sizes = {0xCC: 1, 0xCD: 2, 0xCE: 4}
        return int.from_bytes(rest[: sizes[kind]], "big") if kind in sizes else kind

    return number(b".vgpr_count"), number(b".private_segment_fixed_size")


def code_of(usage: str, sass: str, *, warps: int, shared: int = 0, tensor_memory: int = 0) -> Code:
    """Read one kernel from the text of those tools."""
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    code = instructions(sass)
    opcodes = [opcode for _, opcode, _ in code]
    spans = _loops(sass, code)
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    inside, within = (
        {i for start, end in some for i in range(start, end + 1)} for some in (inner, spans)
    )
    whole = count(opcodes)
    outside = count([opcode for i, opcode in enumerate(opcodes) if i not in within])
    around = count([opcodes[i] for i in sorted(within - inside)])
    loops = tuple(_main([count(opcodes[start : end + 1]) for start, end in inner]))
    return Code(
        used["REG"], used["STACK"] + used["LOCAL"], max(used["SHARED"], shared), warps,
        tensor_memory, whole.loads, whole.stores, outside, around, loops,
    )  # fmt: skip


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?(?:`\((\.L_\w+)\)|\b(0x[0-9a-f]+))")
_PRODUCTS = re.compile(r"(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)\b")


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """Return (address, opcode, line) of every instruction."""
    found = ((_INSTRUCTION.search(line), line) for line in sass.splitlines())
    return [(int(match[1], 16), match[2], line) for match, line in found if match]


def count(opcodes: list[str]) -> Stretch:
    loads, stores = Counter(), Counter()
    products = special = total = 0
    for opcode in opcodes:
        name = opcode.split(".")[0]
        total += name != "NOP"
        products += bool(_PRODUCTS.match(name))
        special += name == "MUFU"
        if name in ("LDG", "LDGSTS"):
            loads[_width(opcode)] += 1
        elif name == "STG":
            stores[_width(opcode)] += 1
    return Stretch(total, products, special, loads, stores)


def _loops(sass: str, code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Return the first and last instruction of every loop, which a branch back encloses."""
    targets: dict[str | int, int] = {address: i for i, (address, _, _) in enumerate(code)}
    index = 0
    for line in sass.splitlines():  # nvdisasm has labels, cuobjdump addresses
        if label := _LABEL.match(line):
            targets[label[1]] = index
        index += bool(_INSTRUCTION.search(line))
    spans = []
    for end, (_, opcode, line) in enumerate(code):
        branch = _BRANCH.search(line) if opcode.split(".")[0] == "BRA" else None
        start = targets.get(branch[1] or int(branch[2], 16)) if branch else None
        # One instruction that jumps to itself ends every kernel.
        if start is not None and start < end:
            spans.append((start, end))
    return spans


def _main(loops: list[Stretch]) -> list[Stretch]:
    """Return the main loops, shortest first: with products; or wide loads; or any loads."""
    for has in (lambda x: x.products, lambda x: max(x.loads, default=0) >= WIDE, lambda x: x.loads):
        if found := list(filter(has, loops)):
            return sorted(found, key=lambda loop: loop.instructions)
    return []


def _width(opcode: str) -> int:
    """Return the bytes of one thread's access."""
    fields = opcode.split(".")
    for field, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1)):
        if field in fields:
            return size
    return 1 if "S8" in fields else 4


def run(tool: Path, *args: object) -> str:
    command = [str(tool), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# -------------------------------------------------------------------------------------------------
# The bound


@dataclass(frozen=True)
class Traffic:
    """The work of one launch, from its shapes."""

    bytes: float  # every tensor once, from or to memory
    blocks: float
    # Iterations of each main loop by all blocks together, the loop of fewest instructions first.
    passes: tuple[float, ...] = ()
    operations: float = 0.0  # on tensor cores, in one pass of one block


def seconds(code: Code, traffic: Traffic, card: Card) -> dict[str, float]:
    """Return the time that each resource needs if it is always busy."""

    def total(field: str) -> float:
        """Sum over all warps: code outside and around loops once, main loops by iterations."""
        inside = sum(n * getattr(x, field) for n, x in zip(traffic.passes, code.loops))
        once = getattr(code.outside, field) + getattr(code.around, field)
        return code.warps * (traffic.blocks * once + inside)

    multiplies = any(loop.products for loop in code.loops)
    operations = sum(traffic.passes) * traffic.operations if multiplies else 0.0
    # Products of single warps do m16n8k16 each, no more.
    by_warps = operations > 0 and traffic.operations <= (
        code.warps * code.loops[0].products * OPERATIONS_OF_A_WARP
    )
    cycles = card.clock * card.processors
    return {
        "memory": traffic.bytes / card.bandwidth,
        "tensor": operations / (card.tensor * (card.of_a_warp if by_warps else 1.0)),
        "special": total("special") * WARP / (SPECIAL_LANES * cycles),
        "issue": total("instructions") / (SCHEDULERS * cycles),
    }
