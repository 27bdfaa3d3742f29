"""Replace Triton's launch: compile as for a chip, and execute the PTX on tensors of the CPU."""

from __future__ import annotations

import functools
import os
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from . import parse
from .machine import Machine, Program
from .memory import Findings, Global

STRUCT = {
    "i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q",
    "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip


@dataclass
class Log:
    """What was launched and what was found. Whoever reports findings clears them."""

    findings: Findings = field(default_factory=Findings)
    instructions: dict[str, Counter] = field(default_factory=dict)  # by kernel, opcode
    launches: int = 0

    def clear(self) -> None:
        self.findings = Findings()
        self.instructions.clear()


LOG = Log()


class Driver:
    """Answer what Triton asks of a CUDA driver when it compiles; each chip is a device."""

    chip: int

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)


@functools.cache
def program_of(ptx: str, name: str) -> Program:
    return Program(parse.kernels(ptx)[name])


def install(chip: int) -> None:
    """Execute every launch from now on as on `chip`, until this process ends.

    The package launches on tensors of the CPU where EXTROPE_TRITON_CHIP names the chip.
    """
    triton.runtime.driver.set_active(Driver())
    compile_for(chip)
    leave_out_ptxas()
    JITFunction.run = functools.partialmethod(run, JITFunction.run)


def compile_for(chip: int) -> None:
    """Execute on another chip; what the package keeps of its launches was for the one before."""
    if (layouts := sys.modules.get("extrope_kernels.ops._torch.layouts")) is not None:
        layouts.forget()
    triton.runtime.driver.active.chip = chip
    os.environ["EXTROPE_TRITON_CHIP"] = str(chip)


def leave_out_ptxas() -> None:
    """Compile as far as PTX: ptxas is half of the time, and nobody runs what it makes.

    Such kernels must not get into the cache that others use.
    """
    triton.knobs.cache.dir = os.path.join(triton.knobs.cache.dir, "without-ptxas")
    CUDABackend.make_cubin = lambda *args, **kwargs: b""


def run(kernel: JITFunction, compile_: Any, *args: Any, grid: Any, warmup: bool = False, **options):
    """Stand in for JITFunction.run: bind, specialise and compile as it does, then execute.

    It returns no kernel: the package would keep it, and launch it without coming here.
    """
    compiled = compile_(kernel, *args, grid=grid, warmup=True, **options)
    binder = kernel.device_caches[triton.runtime.driver.active.chip][-1]
    bound, *_ = binder(*args, **{"debug": False, **options})
    if callable(grid):
        grid = grid(bound)
    given = list(_flatten(compiled.src.signature.values(), bound.values()))
    memory = Global([value for kind, value in given if kind.startswith("*")], LOG.findings)
    metadata = compiled.metadata
    machine = Machine(
        program_of(compiled.asm["ptx"], metadata.name),
        (*grid, 1, 1)[:3],
        (32 * metadata.num_warps, 1, 1),
        _parameters(compiled, given, memory),
        memory,
        metadata.shared,
        seed=LOG.launches,
    )
    machine.run()
    memory.copy_back()
    LOG.launches += 1
    LOG.instructions.setdefault(metadata.name, Counter()).update(machine.instructions())


def _parameters(compiled: Any, given: list[tuple[str, Any]], memory: Global) -> bytes:
    """Lay out a kernel's parameters. Two pointers to scratch memory follow the arguments."""
    metadata = compiled.metadata
    kernel = program_of(compiled.asm["ptx"], metadata.name).kernel
    slots = list(kernel.params.values())
    if len(slots) != len(given) + 2 or metadata.global_scratch_size:
        raise NotImplementedError(f"{metadata.name}: {len(slots)} parameters, or scratch memory")
    params = bytearray(kernel.param_bytes)
    for (offset, size), (kind, value) in zip(slots, given):
        if kind.startswith("*"):
            packed = struct.pack("q", memory.address(value))
        else:
            packed = struct.pack(STRUCT[kind], value)
        if len(packed) != size:
            raise NotImplementedError(f"{metadata.name}: {kind} as a parameter of {size} bytes")
        params[offset : offset + size] = packed
    return bytes(params)


def _flatten(kinds, values):
    """Yield (kind, value) of each parameter; tuples are taken apart, constants are left out."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value
