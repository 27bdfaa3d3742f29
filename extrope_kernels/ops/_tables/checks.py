"""Checks shared by several operations: tensors of heads, positions, boundaries."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._torch.autograd import in_func_transform
from .._torch.layouts import cached_by_layout
from .specs import check_dense

_NUMBERS = (Real, torch.SymInt, torch.SymFloat)
Result = TypeVar("Result")
# The exceptions by which kernels, compiled or not, and PyTorch refuse arguments.
REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def check_freqs(op: str, freqs: object) -> None:
    """Refuse anything but a RopeFreqs of numbers, such as the cosines and sines of others."""
    if not isinstance(freqs, RopeFreqs):
        tables = (
            "; it takes the place of cosines and sines, which are computed from it and positions"
        )
        raise TypeError(
            f"{op}: freqs must be a RopeFreqs, as methods.rope(head_dim) makes one, got "
            f"{type(freqs).__name__}{tables if isinstance(freqs, Tensor | tuple) else ''}"
        )
    # Ops would take a bool, or a tensor without its graph.
    check_real(op, "attention_factor", freqs.attention_factor)
    if freqs.log_decay is not None:
        check_real(op, "decay_origin", freqs.decay_origin)
        if not abs(freqs.decay_origin) < math.inf:
            raise ValueError(f"{op}: decay_origin must be finite, got {freqs.decay_origin}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, q: Tensor, name: str = "cu_seqlens") -> None:
    check_dense(op, name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: {name} must be int32 (sequences + 1,), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous on q's device {q.device}, "
            f"got strides {cu_seqlens.stride()} on {cu_seqlens.device}"
        )


def narrowed(x: Tensor | None) -> Tensor | None:
    """Return int64 boundaries or lengths as int32, which kernels take; anything else as it is."""
    if x is None or not isinstance(x, Tensor) or x.dtype != torch.int64:
        return x
    # What does not fit stays too large, and is refused, instead of wrapping around.
    limits = torch.iinfo(torch.int32)
    return x.clamp(limits.min, limits.max).to(torch.int32)


def check_boundaries(op: str, cu_seqlens: Tensor | None, tokens: int) -> None:
    """Check the values of cu_seqlens if reading them waits for no device."""
    if cu_seqlens is None or not has_values(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the number of tokens {tokens}, got {ends}"
        )


def has_values(x: Tensor) -> bool:
    """Return True if the host can read x at once: in graphs and transforms it has no values."""
    traced = torch.compiler.is_compiling() or in_func_transform()
    return not traced and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


def overlaps_itself(x: Tensor) -> bool:
    """Return True if rows of x are expanded, or lie over each other: it cannot be written."""
    end = 0  # of what the shorter strides reach
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride <= end:
            return True
        end += stride * max(size - 1, 0)
    return False


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Return True if two tensors have a byte of memory in common, whatever their strides are."""
    return meet(memory_of(x), memory_of(y)) and share_bytes(x, y)


def share_bytes(x: Tensor, y: Tensor) -> bool:
    """Return `share_memory` of tensors whose storages do."""
    key = (y.data_ptr() - x.data_ptr(), x.shape, x.stride(), x.itemsize)
    key = (*key, y.shape, y.stride(), y.itemsize)
    return cached_by_layout(_share_bytes, key, *key)


def memory_of(x: Tensor) -> tuple[int, int] | None:
    """Return the addresses of x's storage, begin and end; None if it has none.

    Two storages can be of one memory: from_numpy and from_file make such.
    """
    try:
        storage = x.untyped_storage()
        if storage.device.type == "meta":  # fake tensors too
            return None
        begin = storage.data_ptr()
        return begin, begin + storage.nbytes()
    except RuntimeError:  # tensors of torch.func or of other classes may have no memory
        return None


def meet(x: tuple[int, int] | None, y: tuple[int, int] | None) -> bool:
    """Return True if two ranges of addresses have one in common."""
    return x is not None and y is not None and x[0] < y[1] and y[0] < x[1]


def _share_bytes(distance: int, *layouts: Any) -> bool:
    """Return True if two tensors so many bytes apart share one; layouts: shape, strides, bytes."""
    # Byte i of x is byte j of y where the strides times the differences of their indices add up.
    most: dict[int, int] = {}
    least: dict[int, int] = {}
    for (shape, strides, size), limits, sign in ((layouts[:3], most, 1), (layouts[3:], least, -1)):
        if 0 in shape:
            return False
        for stride, count in ((1, size), *zip([size * n for n in strides], shape)):
            if stride > 0:
                limits[stride] = limits.get(stride, 0) + sign * (count - 1)
    differences = sorted({*least, *most}, reverse=True)
    return _is_reached(distance, [(n, least.get(n, 0), most.get(n, 0)) for n in differences])


def _is_reached(distance: int, sizes: list[tuple[int, int, int]]) -> bool:
    """Return True if numbers between least and most, times their strides, can add up to distance.

    sizes: (stride, least, most), the largest stride first. Strides mostly divide one another, so
    that few numbers are tried.
    """
    if not sizes:
        return distance == 0
    (stride, least, most), *rest = sizes
    smallest, largest = (sum(x[0] * x[n] for x in rest) for n in (1, 2))
    first = max(least, -((largest - distance) // stride))
    last = min(most, (distance - smallest) // stride)
    return any(_is_reached(distance - n * stride, rest) for n in range(first, last + 1))


def split_offset(op: str, positions: Tensor | int | None) -> tuple[Tensor | None, int]:
    """Split the `positions` of a public function into the op's (positions, offset)."""
    if type(positions) is int and -(2**63) <= positions < 2**63:
        return None, positions  # first: every step of a decode comes here
    if positions is None or isinstance(positions, Tensor):
        return positions, 0
    if isinstance(positions, bool) or not isinstance(positions, (int, torch.SymInt)):
        raise TypeError(
            f"{op}: positions must be a Tensor, an int or None, got {type(positions).__name__}"
        )
    if not -(2**63) <= positions < 2**63:
        raise ValueError(f"{op}: positions must fit in int64, got {positions}")
    return None, positions


def check_real(op: str, name: str, value: float) -> None:
    if type(value) is float:
        return
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if isinstance(value, Real):
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} must be finite, got one past float64") from None


def check_rotary_offset(op: str, rotary_offset: int, rotary_dim: int, head_dim: int) -> None:
    """Check the first rotated dim: all rotary_dim dims from there on must exist."""
    if not 0 <= rotary_offset <= head_dim - rotary_dim:
        raise ValueError(
            f"{op}: rotary_offset must be from 0 to head_dim - rotary_dim = "
            f"{head_dim - rotary_dim}, got {rotary_offset}"
        )


def check_int(op: str, name: str, value: int) -> None:
    """Check that a value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")


def check_count(op: str, name: str, value: int) -> int:
    """Check a number of tokens, >= 1."""
    check_int(op, name, value)
    if value < 1:
        raise ValueError(f"{op}: {name} must be >= 1, got {value}")
    if value >= 2**62:
        raise ValueError(f"{op}: {name} must be < 2**62, got {value}")
    return value


def refuse_flags(op: str, **flags: bool) -> None:
    """Raise TypeError for the first flag that is not a bool."""
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise TypeError(f"{op}: {name} must be a bool, got {type(flag).__name__}")


def raise_as_value_error(error: Exception, op: str, function: str | None = None) -> None:
    """Raise a kernel's refusal as the ValueError of the public function."""
    ours = isinstance(error, (RuntimeError, ValueError)) and str(error).startswith(f"{op}: ")
    if ours and str(error).startswith(f"{op}: cannot allocate"):
        raise RuntimeError(str(error).splitlines()[0].replace(op, function or op, 1)) from None
    if ours and not isinstance(error, NotImplementedError):
        refusal = str(error).splitlines()[0].removeprefix(op)
        raise ValueError((function or op) + refusal) from None
