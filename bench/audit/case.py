"""What is audited: a case, what it compiles to, and what a launch of it has to move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

CAPABILITIES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Case:
    """One configuration of a kernel on one chip."""

    kernel: str
    capability: int
    head_dim: int
    dtype: str
    variant: str = ""  # what else the kernel is compiled for, in words

    def __str__(self) -> str:
        words = [*self.kernel.split(), f"sm_{self.capability}", f"D{self.head_dim}", self.dtype]
        return "-".join([*words, *self.variant.split()])

    def has(self, word: str) -> bool:
        return word in self.variant.split()


@dataclass(frozen=True)
class Binary:
    """What one case compiled to."""

    registers: int
    stack: int  # bytes of a thread: spills and local arrays
    local: int
    shared: int  # bytes of a block, static and dynamic
    warps: int  # of a block
    sass: str
    tensor_memory: int = 0  # columns of a block, on chips that keep products' sums there


@dataclass(frozen=True)
class Traffic:
    """What one launch has to do, from its shapes."""

    bytes: float  # every tensor once, from or to memory
    blocks: float
    # How often all blocks together go round each main loop, the one of fewest instructions first.
    passes: tuple[float, ...]
    # Bytes of rows that one block loads in one pass of a main loop, and stores in all: at least so
    # much must go by 16 bytes a thread. Positions and row sums come on top, in any width.
    loaded: float
    stored: float
    around: float = 0.0  # how often all blocks together go round a loop that holds main loops
    operations: float = 0.0  # on tensor cores, in one pass of one block


class Source(Protocol):
    """What a case is compiled from."""

    def made_from(self, capability: int) -> str:
        """A hash of all that decides the machine code, and of nothing else; compiles nothing."""

    def compile(self, capability: int) -> Binary: ...


@dataclass(frozen=True)
class Kernel:
    """One entry of the audit: how to compile a kernel's cases, and what they are judged by."""

    name: str
    cases: Sequence[Case]
    prepare: Callable[[Case], tuple[Source, Traffic]]
    sample: Callable[[Case], bool]  # is it among those that every test run compiles?
    at_once: bool = False  # one compilation makes every case
    plain: Callable[[Case], Case] | None = None  # a plain kernel of the same tile, to compare with
    holds_stack: bool = False  # no more than that plain kernel does


def empty(*shape: int, dtype: str = "float32") -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
