"""Shared by the strategies: random integers, and the copy of a result to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_below(limits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a number of {0, ..., limit - 1} for every limit, equally likely: int64, on the CPU.

    `torch.randint` takes one limit for all, and reduces 32 random bits by it: some numbers are then
    likelier by up to limit / 2**32. With 62 bits that is limit / 2**62.
    """
    wide = torch.randint(2**62, limits.shape, generator=generator, dtype=torch.int64, device="cpu")
    return wide % limits


def copy_to(result: Tensor, device: torch.device) -> Tensor:
    """Copy a result from the CPU to `device` without making the host wait for the device."""
    return result.to(device, non_blocking=True)
