"""Compile Triton launches ahead of time, without a GPU, and read what the machine code needs.

Usable only in a process without TRITON_INTERPRET: the decorator picks interpreter or compiler when
a kernel module is imported.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

# Bytes of shared memory that one block may use, by compute capability.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDriver:
    """Answers what compilation asks of a CUDA driver; each capability is a device of its own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass(frozen=True)
class Launch:
    """One launch of a jitted kernel: what a launcher passed to it."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class Binary:
    """What one launch compiled to."""

    registers: int
    stack: int  # bytes of spills and local arrays
    local: int
    shared: int  # bytes, static and dynamic
    ptx: str
    sass: str

    def count(self, pattern: str) -> int:
        """Number of SASS instructions that match `pattern`."""
        return len(re.findall(pattern, self.sass))

    def loops(self) -> list[str]:
        """The SASS of every loop that holds no other, in order: what a branch back encloses."""
        labels: dict[str, int] = {}
        instructions: list[str] = []
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            if re.search(r"/\*[0-9a-f]{4,}\*/", line):
                instructions.append(line)
        loops = []
        for end, line in enumerate(instructions):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and labels.get(branch[1], end + 1) <= end:
                loops.append((labels[branch[1]], end))
        inner = [
            a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)
        ]
        return ["\n".join(instructions[start : end + 1]) for start, end in inner]


def record_launches(module: ModuleType, kernel_name: str, call: Callable[[], None]) -> list[Launch]:
    """Run `call` with the kernel replaced by a recorder: the launches as shipped, never made."""
    launches: list[Launch] = []
    kernel = getattr(module, kernel_name)

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(Launch(kernel, grid, args, kwargs))

    with mock.patch.object(module, kernel_name, Recorder()):
        call()
    return launches


def compile_launch(launch: Launch, capability: int) -> Binary:
    """Compile a launch for sm_`capability`, specialised on its arguments as at run time."""
    with _driver(capability):
        compiled = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
    fields = {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)
    }
    return Binary(
        registers=fields["REG"],
        stack=fields["STACK"],
        local=fields["LOCAL"],
        shared=max(fields["SHARED"], compiled.metadata.shared),
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


@contextmanager
def _driver(capability: int):
    driver = triton.runtime.driver
    with mock.patch.object(driver, "_active", _NoDriver(capability)):
        yield


def _run(tool: str, *args: object) -> str:
    command = [str(_TOOLS / tool), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
