"""Dtypes of computation, and the numbers of caches in float8_e4m3fn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._torch.autograd import constant_when_compiled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Function = Callable[Concatenate[Tensor, Parameters], Result]


def without_autocast(function: Function[Parameters, Result]) -> Function[Parameters, Result]:
    """Run the function without autocast: like kernels, it computes in the dtypes it names."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Parameters.args, **options: Parameters.kwargs) -> Result:
        device = x.device.type
        if not _may_autocast(device) or not torch.is_autocast_enabled(device):
            return function(x, *args, **options)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **options)

    return run


@constant_when_compiled  # PyTorch 2.11's compiler cannot trace it
def _may_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are computed and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -------------------------------------------------------------------------------------------------
# Caches of float8_e4m3fn: value = stored * scale, one scale for each head of k

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite float8_e4m3fn


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Divide rows (..., heads, head_dim) by their scale, round to nearest even, clamp to ±448."""
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8)


def dequantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Widen cached rows, and multiply them by their scale if they have one."""
    return x.to(dtype) if scale is None else x.to(dtype) * scale[:, None]


def as_bits(cache: Tensor) -> Tensor:
    """View fp8 as bytes for Triton's kernels: some of their chips lack the type."""
    return cache.view(torch.int8)
