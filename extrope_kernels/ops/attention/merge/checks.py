"""What a merge is refused, in words that name the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._shared.checks import DTYPES, overlaps_itself
from ..call import lse_shape

OP = "merge_attention"
INPLACE = f"{OP}: inplace=True is for inference, got tensors that require grad"


def check(outs: Sequence[Tensor], lses: Sequence[Tensor], inplace: bool) -> None:
    """Raise ValueError or TypeError for anything that a merge cannot take."""
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not all(isinstance(x, Tensor) for x in tensors):
            raise not_tensors(name, tensors)
    if not outs:
        raise ValueError(f"{OP}: outs must hold at least one tensor, got none")
    if len(lses) != len(outs):
        raise ValueError(
            f"{OP}: lses must hold one tensor for each of the {len(outs)} outs, got {len(lses)}"
        )
    first = outs[0]
    if first.dim() not in (3, 4):
        raise ValueError(
            f"{OP}: outs must be (batch, seqlen, heads, head_dim), or packed "
            f"(total, heads, head_dim), got shape {tuple(first.shape)}"
        )
    if not first.dtype.is_floating_point:
        raise ValueError(f"{OP}: outs must be floating point, got {first.dtype}")
    if lses[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{OP}: lses must be float32 or float64, got {lses[0].dtype}")
    for name, tensors, shape in (("outs", outs, first.shape), ("lses", lses, lse_shape(first))):
        for i, x in enumerate(tensors):
            narrower = inplace and name == "outs" and x.dtype in (torch.bfloat16, torch.float16)
            dtype = x.dtype if narrower else tensors[0].dtype
            _check_like(f"{name}[{i}]", x, tuple(shape), dtype, first.device)
    if inplace and (overlaps_itself(first) or overlaps_itself(lses[0])):
        raise ValueError(f"{OP}: outs[0] and lses[0] must not be expanded to be written to")


def check_rows(outs: Sequence[Tensor]) -> None:
    """What kernels alone ask for."""
    for i, x in enumerate(outs):
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{OP}: outs[{i}] must be float32, bfloat16, float16 or float64, got {x.dtype}"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(
                f"{OP}: outs[{i}] must be contiguous in its last dimension, "
                f"got strides {x.stride()}"
            )


def not_tensors(name: str, value: object) -> TypeError:
    return TypeError(
        f"{OP}: {name} must be a sequence of Tensors or a stacked Tensor, "
        f"got {type(value).__name__}"
    )


def _check_like(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{OP}: {name} must have shape {shape}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{OP}: {name} must be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{OP}: {name} must be on {device}, got {x.device}")
