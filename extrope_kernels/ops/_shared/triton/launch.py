"""Facts needed for launches: the chip, and the strides of rows."""

from __future__ import annotations

import functools
import os

import torch
import triton
from torch import Tensor

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


@functools.cache
def _chip(device: int) -> int | str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
