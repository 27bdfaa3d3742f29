"""A driver for Triton that compiles for a chip and launches nothing: the host's path, and no GPU.

With EXTROPE_TRITON_CHIP in the environment, and TRITON_INTERPRET not, before extrope_kernels is
imported; then `install()`, and tensors of the CPU go as far as a launch.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget

# What a Hopper tells; kernels that need more than the chip has are the audit's to find.
_PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class NullDriver:
    """Counts launches by the name of their kernel."""

    def __init__(self, chip: int) -> None:
        self.chip = chip
        self.launches: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, name, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: _PROPERTIES,
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
        return GPUTarget("cuda", self.chip, 32)


def install() -> NullDriver:
    """Let Triton launch through a driver that does nothing, on the chip of EXTROPE_TRITON_CHIP."""
    driver = NullDriver(int(os.environ["EXTROPE_TRITON_CHIP"]))
    triton.runtime.driver._active = driver
    return driver
