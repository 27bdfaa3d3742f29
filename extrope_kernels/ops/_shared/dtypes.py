"""The dtypes that ops compute in."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that what is of `dtype` is computed and summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
