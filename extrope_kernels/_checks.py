"""Argument checks of methods and scores: each returns the checked value or raises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def check_dim(method: str, dim: int, minimum: int = 2) -> int:
    """Return `dim` as an int; it must be even and at least `minimum`."""
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        raise TypeError(f"{method}: dim must be an int, got {dim!r}")
    if dim < minimum or dim % 2:
        raise ValueError(f"{method}: dim must be even and >= {minimum}, got {dim}")
    if dim >= 2**31:
        raise ValueError(f"{method}: dim must be < 2**31, got {dim}")
    return int(dim)


def check_real(
    method: str,
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    finite: bool = True,
) -> float:
    """Return `value` as a float within the given bounds; finite, or at least a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{method}: {name} must be a number, got {value!r}")
    number = float(value)
    if not abs(number) < math.inf and (finite or math.isnan(number)):
        raise ValueError(f"{method}: {name} must be finite, got {value}")
    if above is not None and number <= above:
        raise ValueError(f"{method}: {name} must be > {above:g}, got {value}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{method}: {name} must be >= {at_least:g}, got {value}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{method}: {name} must be <= {at_most:g}, got {value}")
    return number


def check_int(method: str, name: str, value: int, *, at_least: int) -> int:
    """Return `value`, an int of at least `at_least`, to which kernels can add in 64 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{method}: {name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{method}: {name} must be >= {at_least}, got {value}")
    if value >= 2**62:
        raise ValueError(f"{method}: {name} must be < 2**62, got {value}")
    return int(value)


def check_base(method: str, base: float) -> float:
    """Return `base` as a float; it must be > 1 for the frequencies to fall with the pair index."""
    return check_real(method, "base", base, above=1)


def check_factor(method: str, factor: float) -> float:
    """Return an extension factor as a float; it must be > 0."""
    return check_real(method, "factor", factor, above=0)


def check_length(method: str, name: str, value: int) -> int:
    """Return a number of tokens as an int; it must be whole and positive."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value  # as it is, so that torch.compile can keep a length symbolic
    number = check_real(method, name, value, above=0)
    if number != int(number):
        raise ValueError(f"{method}: {name} must be a whole number of tokens, got {value}")
    return int(number)


def check_seq_len(method: str, seq_len: int | Tensor) -> int | Tensor:
    """Return `seq_len`: an int > 0, or an integer tensor of shape () or (batch,).

    The values of a tensor are not looked at: reading them would make the host wait for the device.
    """
    if not isinstance(seq_len, Tensor):
        return check_length(method, "seq_len", seq_len)
    if seq_len.is_floating_point() or seq_len.is_complex() or seq_len.dtype == torch.bool:
        raise TypeError(f"{method}: seq_len must hold integers, got a {seq_len.dtype} tensor")
    if seq_len.dim() > 1:
        shape = tuple(seq_len.shape)
        raise ValueError(f"{method}: seq_len must have shape () or (batch,), got {shape}")
    return seq_len


def check_choice(method: str, name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value`, which must be one of `choices`."""
    if value not in tuple(choices):
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{method}: {name} must be one of {expected}, got {value!r}")
    return value


def check_bool(method: str, name: str, value: bool) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{method}: {name} must be a bool, got {value!r}")
    return value


def check_falling(method: str, high_name: str, high: float, low_name: str, low: float) -> None:
    """Check that both numbers are > 0 and that `high` is the greater."""
    check_real(method, high_name, high, above=0)
    check_real(method, low_name, low, above=0)
    if high <= low:
        raise ValueError(f"{method}: {high_name} must be > {low_name}, got {high} and {low}")


def check_pair_factors(method: str, name: str, factors: Sequence[float], pairs: int) -> list[float]:
    """Return one positive factor per pair as a list of floats."""
    if isinstance(factors, str | bytes) or not isinstance(factors, Sequence):
        raise TypeError(f"{method}: {name} must be a list of numbers, got {factors!r}")
    if len(factors) != pairs:
        raise ValueError(f"{method}: {name} must have {pairs} entries, got {len(factors)}")
    return [check_real(method, f"{name}[{i}]", factor, above=0) for i, factor in enumerate(factors)]
