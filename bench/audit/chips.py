"""What each chip holds and can do, and what follows for a kernel: occupancy and roofline time.

Limits of a processor (SM): CUDA C++ Programming Guide, appendix Compute Capabilities. Peaks:
NVIDIA's data sheets of A100 80 GB SXM, H100 SXM and HGX B200, dense; each clock is the one at which
SMs times a tensor core's operations a cycle give that peak. On sm_90 only wgmma reaches it:
products of one warp (mma.sync) came to 62.9% of it on average in https://arxiv.org/abs/2402.13499.
For sm_100 no such figure is known, and products of one warp are given the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .case import Binary

if TYPE_CHECKING:
    from .reading import Code

WARP = 32
REGISTERS = 65_536  # of an SM, on all of these, given to a warp in units of 256
REGISTER_UNIT = 256
SHARED_RESERVED = 1024  # bytes of each block, for the system
TENSOR_COLUMNS = 512  # of an SM's tensor memory, where it has one
SCHEDULERS = 4  # of an SM; each issues one instruction a cycle
SPECIAL_LANES = 16  # exponentials and the like of an SM a cycle


@dataclass(frozen=True)
class Chip:
    """Limits of one compute capability."""

    capability: int
    block_shared: int  # bytes that one block may use
    shared: int  # bytes of an SM
    warps: int  # resident on an SM
    blocks: int

    def residence(self, binary: Binary | Code) -> int:
        """How many of its blocks an SM holds at a time."""
        registers, shared, warps = binary.registers, binary.shared, binary.warps
        per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // warps if registers else self.blocks
        by_shared = self.shared // (shared + SHARED_RESERVED)
        columns = binary.tensor_memory
        by_columns = TENSOR_COLUMNS // columns if columns else self.blocks
        return min(by_registers, by_shared, by_columns, self.warps // warps, self.blocks)


@dataclass(frozen=True)
class Card:
    """A product's peaks, a second."""

    name: str
    capability: int
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes
    tensor: float  # operations in bfloat16 and float16, sums in float32
    of_a_warp: float = 1.0  # of that rate, what products of one warp (mma.sync) reach

    def seconds(self, work: Work) -> dict[str, float]:
        """The time that each resource needs for `work`, were it always busy."""
        cycles = self.clock * self.processors
        rate = self.of_a_warp if work.by_warps else 1.0
        return {
            "memory": work.bytes / self.bandwidth,
            "tensor": work.tensor_operations / (self.tensor * rate),
            "special": work.special * WARP / (SPECIAL_LANES * cycles),
            "issue": work.instructions / (SCHEDULERS * cycles),
        }


@dataclass(frozen=True)
class Work:
    """What one launch moves and executes. Instructions count once a warp."""

    bytes: float
    tensor_operations: float
    special: float
    instructions: float
    by_warps: bool = False  # products are mma.sync, not wgmma or tcgen05


CHIPS = {
    chip.capability: chip
    for chip in (
        Chip(80, block_shared=166_912, shared=167_936, warps=64, blocks=32),
        Chip(86, block_shared=101_376, shared=102_400, warps=48, blocks=16),
        Chip(89, block_shared=101_376, shared=102_400, warps=48, blocks=24),
        Chip(90, block_shared=232_448, shared=233_472, warps=64, blocks=32),
        Chip(100, block_shared=232_448, shared=233_472, warps=64, blocks=32),
        Chip(120, block_shared=101_376, shared=102_400, warps=48, blocks=24),
    )
}

CARDS = {
    card.capability: card
    for card in (
        Card("A100", 80, processors=108, clock=1.41e9, bandwidth=2.039e12, tensor=312e12),
        Card("H100", 90, 132, clock=1.83e9, bandwidth=3.35e12, tensor=989.4e12, of_a_warp=0.629),
        Card("B200", 100, processors=148, clock=1.86e9, bandwidth=8.0e12, tensor=2250e12),
    )
}
