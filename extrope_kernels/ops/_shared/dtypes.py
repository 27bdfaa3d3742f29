"""The dtypes that ops compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from .autograd import constant_when_compiled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Function = Callable[Concatenate[Tensor, Parameters], Result]


def without_autocast(function: Function[Parameters, Result]) -> Function[Parameters, Result]:
    """The function in the dtypes that it asks for: as kernels, it knows nothing of autocast."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Parameters.args, **options: Parameters.kwargs) -> Result:
        device = x.device.type
        if not _may_autocast(device) or not torch.is_autocast_enabled(device):
            return function(x, *args, **options)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **options)

    return run


@constant_when_compiled  # torch.compile of PyTorch 2.11 cannot look into it
def _may_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that what is of `dtype` is computed and summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
