"""What Triton's interpreter loses, and a GPU does not."""

import torch

from extrope_kernels.testing import device


def truncation(backend: str, dtype: torch.dtype) -> float:
    """The units in the last place that it truncates where it casts to bfloat16; a GPU rounds."""
    return 1.0 if backend == "triton" and dtype == torch.bfloat16 and device() == "cpu" else 0.0
