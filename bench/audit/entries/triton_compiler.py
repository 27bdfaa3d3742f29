"""Compile Triton launches ahead of time, without a GPU, specialised as they are at run time.

Usable only in a process without TRITON_INTERPRET: the decorator picks interpreter or compiler when
a kernel module is imported.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from ..case import Binary

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def record(
    module: ModuleType, kernel: str, call: Callable[[], object], others: tuple[str, ...] = ()
) -> Launch:
    """Run `call` with the module's kernels replaced by recorders: the first launch of `kernel` as
    shipped, never made. Launches of `others` go nowhere.
    """
    launches: dict[str, list[Launch]] = {name: [] for name in (kernel, *others)}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            kept = launches[self.name]
            return lambda *args, **kwargs: kept.append(Launch(self.kernel, grid, args, kwargs))

    with ExitStack() as stack:
        for name in launches:
            stack.enter_context(mock.patch.object(module, name, Recorder(name)))
        call()
    return launches[kernel][0]


def compile_launch(launch: Launch, capability: int) -> Binary:
    with _driver(capability):
        compiled = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return Binary(
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=max(used["SHARED"], compiled.metadata.shared),
        warps=compiled.metadata.num_warps,
        sass=sass,
        tensor_memory=compiled.metadata.tmem_size or 0,
    )


@contextmanager
def _driver(capability: int):
    with mock.patch.object(triton.runtime.driver, "_active", _NoDriver(capability)):
        yield


def _run(tool: str, *args: object) -> str:
    command = [str(TOOLS / tool), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
