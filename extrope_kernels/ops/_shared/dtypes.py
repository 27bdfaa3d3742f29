"""Dtypes of computation, and caches in float8_e4m3fn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .autograd import constant_when_compiled

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
MISSING = "needs k_scale and v_scale, (heads_k,) float32"


class Scales(NamedTuple):
    """Scales of a cache's keys and values, (heads_k,) float32 each; None if it is not fp8."""

    k: Tensor | None = None
    v: Tensor | None = None


NO_SCALES = Scales()


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Divide rows (..., heads, head_dim) by their scale, round to nearest even, clamp to ±448."""
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8)


def dequantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Widen cached rows, and multiply them by their scale if they have one."""
    return x.to(dtype) if scale is None else x.to(dtype) * scale[:, None]


def check_cache_dtype(op: str, name: str, cache: Tensor, like: Tensor, scales: Scales) -> None:
    """Check that a cache has the other tensors' dtype, or fp8 with scales."""
    given = [f"{n}_scale" for n, x in zip("kv", scales) if x is not None]
    if cache.dtype == FP8 and len(given) == 2 and cache.device == like.device:
        return
    if cache.dtype == FP8 and len(given) < 2:
        raise ValueError(f"{op}: {name} in {FP8} {MISSING}, got {given[0] if given else 'none'}")
    if cache.dtype != FP8 and given:
        raise ValueError(
            f"{op}: k_scale and v_scale are for caches in {FP8}, got {name} in {cache.dtype}"
        )
    if cache.dtype != like.dtype or cache.device != like.device:
        raise ValueError(
            f"{op}: {name} must be {like.dtype} on {like.device} like q, k and v, or {FP8} with "
            f"k_scale and v_scale, got {cache.dtype} on {cache.device}"
        )


def as_bits(cache: Tensor) -> Tensor:
    """View fp8 as bytes for Triton's kernels: some of their chips lack the type."""
    return cache.view(torch.int8)


def check_scales(op: str, scales: Scales, heads: int, like: Tensor) -> None:
    """Check the scales if given: one per head."""
    for name, x in zip(("k_scale", "v_scale"), scales):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
        fits = (
            x.layout == torch.strided
            and x.shape == (heads,)
            and x.dtype == torch.float32
            and x.is_contiguous()
        )
        if not fits or x.device != like.device:
            raise ValueError(
                f"{op}: {name} must be contiguous float32 ({heads},) on {like.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def check_scale_values(op: str, scales: Scales) -> None:
    """Check that scales are positive, on a CPU, where reading them costs nothing."""
    for name, x in zip(("k_scale", "v_scale"), scales):
        if x is not None and not ((x > 0) & x.isfinite()).all():
            raise ValueError(f"{op}: {name} must be positive numbers, got {x.tolist()}")
