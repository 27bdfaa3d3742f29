"""Argument checks shared by the strategies: each returns the checked value or raises."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # positions then fit int32, the narrowest kind that the rotation takes


def check_count(strategy: str, name: str, value: int, at_least: int = 1) -> int:
    """Return a number of tokens, sequences or positions as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"positions.{strategy}: {name} must be an int, got {value!r}")
    if not at_least <= value <= LARGEST:
        raise ValueError(
            f"positions.{strategy}: {name} must be >= {at_least} and < 2**31, got {value}"
        )
    return int(value)


def check_counts(
    strategy: str, name: str, values: int | Sequence[int] | Tensor, batch: int
) -> Tensor:
    """Return a positive number for every sequence: (batch, 1) int64 on the CPU."""
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(
                f"positions.{strategy}: {name} must hold integers, got a {values.dtype} tensor"
            )
        if values.dim() != 1:
            raise ValueError(
                f"positions.{strategy}: {name} must have shape ({batch},), "
                f"got {tuple(values.shape)}"
            )
        values = values.tolist()
    elif isinstance(values, Integral):
        values = [values] * batch
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(
            f"positions.{strategy}: {name} must be an int, or one int per sequence, got {values!r}"
        )
    if len(values) != batch:
        raise ValueError(
            f"positions.{strategy}: {name} must have {batch} entries, got {len(values)}"
        )
    counts = [check_count(strategy, name, value) for value in values]
    return torch.tensor(counts, dtype=torch.int64, device="cpu").unsqueeze(-1)


def check_bool(strategy: str, name: str, value: bool) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"positions.{strategy}: {name} must be a bool, got {value!r}")
    return value


def check_generator(strategy: str, generator: torch.Generator | None) -> torch.Generator | None:
    """Return `generator`, which must be None or draw on the CPU."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"positions.{strategy}: generator must be a torch.Generator or None, "
            f"got {type(generator).__name__}"
        )
    if generator.device.type != "cpu":
        raise ValueError(
            f"positions.{strategy}: generator must be on the CPU, got one on {generator.device}"
        )
    return generator


def check_device(strategy: str, device: torch.device | str | int | None) -> torch.device:
    """Return the device of the result; None is the CPU."""
    if device is None:
        return torch.device("cpu")
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"positions.{strategy}: device must be a torch device, got {device!r}") from None
