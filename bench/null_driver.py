"""A driver for Triton that compiles for a chip and launches nothing: the host's path, and no GPU.

With EXTROPE_TRITON_CHIP in the environment, and TRITON_INTERPRET not, before extrope_kernels is
imported; then `install()`, and tensors of the CPU go as far as a launch.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

# Bytes of shared memory that a block may have, past which Triton refuses to launch.
_SHARED = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    "gfx942": 65536,
}


class NullDriver:
    """Counts launches by the name of their kernel."""

    def __init__(self, chip: int | str) -> None:
        self.target = GPUTarget("cuda", chip, 32)
        if not isinstance(chip, int):
            self.target = GPUTarget("hip", chip, 64)
        self.launches: list[str] = []
        properties = {"max_shared_mem": _SHARED.get(chip, 101376)}
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, name, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def launcher_cls(self, source, metadata):
        note, name = self.launches.append, metadata.name

        def launch(*args) -> None:
            note(name)

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


def install() -> NullDriver:
    """Let Triton launch through a driver that does nothing, on the chip of EXTROPE_TRITON_CHIP."""
    chip = os.environ["EXTROPE_TRITON_CHIP"]
    driver = NullDriver(int(chip) if chip.isdigit() else chip)
    triton.runtime.driver._active = driver
    return driver
