"""The launch of a kernel, and facts needed for it: the chip, and the strides of rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

VECTOR_BYTES = 16
INTERPRETED = triton.knobs.runtime.interpret
# Multiprocessors, if there is no device to ask: A100, H100, B200 and similar chips.
_PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Return strides of x, 0 along dimensions of size 1: torch does not define those."""
    return tuple(0 if size == 1 else n for size, n in zip(x.shape, x.stride(), strict=True))


def chip_of(x: Tensor) -> int | str | None:
    """Return the chip that kernels on x are compiled for.

    For NVIDIA it is 10 * major + minor of the compute capability, for AMD a name, None for the
    interpreter. With EXTROPE_TRITON_CHIP in the environment, tensors on other devices are launched
    as on that chip; Triton's driver decides the effect.
    """
    if INTERPRETED:
        return None
    if x.is_cuda:
        return _chip(x.device.index)
    chip = os.environ.get("EXTROPE_TRITON_CHIP")
    if chip is None:
        raise NotImplementedError(
            "triton: tensors must be on a GPU, unless TRITON_INTERPRET=1 interprets the kernels, "
            f"got one on {x.device}"
        )
    return int(chip) if chip.isdigit() else chip


def processors_of(x: Tensor) -> int:
    """Return the number of multiprocessors to keep busy."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    chip = chip_of(x)
    known = max((n for n in _PROCESSORS if isinstance(chip, int) and n <= chip), default=90)
    return _PROCESSORS[known]


class Launch:
    """A launch without its tensors, for tensors of one layout on one device.

    Triton looks at every argument to find the kernel compiled for them. That takes most of a
    call's time on the host, and all that it finds follows from the layout, but for one thing: does
    16 divide the addresses? So the first launch goes Triton's way and keeps the kernel. Later ones
    run it, unless an address is not divisible. AMD's kernels depend on the size of storages too:
    they always go Triton's way, as the interpreter does, which compiles nothing.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: Sequence[float], options: dict[str, Any]
    ) -> None:
        """Describe the launch.

        numbers: of the layout, the kernel's last arguments before its constexprs.
        options: constexprs, Triton's launch options, and numbers that are not in `numbers`.
        """
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self._kept: Callable[..., None] | None = None
        self._fixed: tuple[Any, ...] = ()  # the kept kernel's arguments that follow from the layout

    def __call__(self, tensors: Sequence[Tensor | None], *numbers: int) -> None:
        """Launch on the tensors' GPU, unless the grid is empty.

        tensors: the kernel's first arguments; of the first two at most one is None.
        numbers: its next, which may differ in every call; their types must be annotated.
        """
        if 0 in self.grid:
            return
        x: Any = tensors[1] if tensors[0] is None else tensors[0]
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(x):
                self._launch(tensors, numbers)
        else:
            self._launch(tensors, numbers)

    def _launch(self, tensors: Sequence[Tensor | None], numbers: tuple[int, ...]) -> None:
        for x in tensors:
            if x is not None and x.data_ptr() % 16:
                self._by_triton(tensors, numbers)
                return
        if self._kept is not None:
            self._kept(*tensors, *numbers, *self._fixed)
            return
        compiled = self._by_triton(tensors, numbers)
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            options = (self.options[x] for x in self.kernel.arg_names if x in self.options)
            self._kept = compiled[(*self.grid, 1, 1)[:3]]
            self._fixed = (*self.numbers, *options)

    def _by_triton(self, tensors: Sequence[Tensor | None], numbers: tuple[int, ...]) -> Any:
        return self.kernel[self.grid](*tensors, *numbers, *self.numbers, **self.options)


@functools.cache
def _chip(device: int) -> int | str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
