"""What launchers need to know of tensors."""

from torch import Tensor

VECTOR_BYTES = 16


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides of x, 0 along dimensions of size 1: torch leaves those open."""
    return tuple(0 if size == 1 else n for size, n in zip(x.shape, x.stride(), strict=True))
