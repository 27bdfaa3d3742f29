"""A driver for Triton that compiles for a chip and launches nothing: the host's path without a GPU.

Set EXTROPE_TRITON_CHIP, and not TRITON_INTERPRET, before extrope_kernels is imported; then call
`install()`. CPU tensors go as far as a launch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from machine_code import AMD_SHARED, CHIPS
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A launch of one kernel, with the binary that would have run."""

    name: str
    module: str  # of the kernel's source
    grid: tuple[int, ...]
    args: dict[str, Any]
    cubin: bytes
    warps: int
    shared: int
    tensor_memory: int
    types: dict[str, str]  # "i32", "*bf16", ... by an argument's name

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name."""
        return self.args[name]


class NullDriver:
    """A driver that counts launches by kernel name; keep: with their arguments and binaries."""

    def __init__(self, chip: int | str, keep: bool = False) -> None:
        if isinstance(chip, int):
            self.target, shared = GPUTarget("cuda", chip, 32), CHIPS[chip].block_shared
        else:
            threads = 64 if chip.startswith("gfx9") else 32  # of a wavefront
            self.target, shared = GPUTarget("hip", chip, threads), AMD_SHARED[chip]
        self.launches: list[str] = []
        self.handles: list[Any] = []  # of the kernels that were launched
        self.kept: list[Launch] = []
        self.keep = keep
        self._loaded = b""
        # With more shared memory than a block may have, Triton refuses to launch.
        properties = {"max_shared_mem": shared}
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        self._loaded = binary
        return 1, name, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any):
        names, binary = source.fn.arg_names, b""

        def launch(*args: Any) -> None:
            nonlocal binary
            self.launches.append(metadata.name)
            self.handles.append(args[4])
            if self.keep:
                binary = binary or self._loaded  # Triton loads it right before its first launch
                self.kept.append(Launch(
                    metadata.name, source.fn.fn.__module__, args[:3],
                    dict(zip(names, args[-len(names) :])), binary, metadata.num_warps,
                    metadata.shared, getattr(metadata, "tmem_size", 0) or 0,
                    dict(zip(names, source.signature.values())),
                ))  # fmt: skip

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@triton.jit
def bare_kernel(x, y, count):
    tl.store(x, tl.load(y) + count)


def install(keep: bool = False) -> NullDriver:
    """Let Triton launch through a driver that does nothing, on the chip of EXTROPE_TRITON_CHIP."""
    chip = os.environ["EXTROPE_TRITON_CHIP"]
    driver = NullDriver(int(chip) if chip.isdigit() else chip, keep)
    triton.runtime.driver._active = driver
    return driver
