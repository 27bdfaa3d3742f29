"""Argument checks of methods, positions and scores: each returns the checked value or raises.

`function`: the name that an error begins with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_real(
    function: str,
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return `value` as a float within the given bounds, and finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: {name} must be a number, got {value!r}")
    number = as_float(function, name, value)
    if not abs(number) < math.inf:
        raise ValueError(f"{function}: {name} must be finite, got {value}")
    if above is not None and number <= above:
        raise ValueError(f"{function}: {name} must be > {above:g}, got {value}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{function}: {name} must be >= {at_least:g}, got {value}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{function}: {name} must be <= {at_most:g}, got {value}")
    return number


def as_float(function: str, name: str, value: Real) -> float:
    """Return `value` as a float; an int may be too large for one."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{function}: {name} must be finite, got one past float64") from None


def check_int(function: str, name: str, value: int, *, at_least: int, bits: int = 62) -> int:
    """Return `value`, an int from `at_least` to 2**bits; by default kernels can add to it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{function}: {name} must be >= {at_least}, got {value}")
    if value >= 2**bits:
        raise ValueError(f"{function}: {name} must be < 2**{bits}, got {value}")
    return int(value)


def check_count(function: str, name: str, value: int, at_least: int = 1) -> int:
    """Return a number of tokens, sequences or positions that fits into int32."""
    return check_int(function, name, value, at_least=at_least, bits=31)


def check_dim(function: str, dim: int, minimum: int = 2) -> int:
    """Return `dim` as an int; it must be even and at least `minimum`."""
    dim = check_count(function, "dim", dim, at_least=minimum)
    if dim % 2:
        raise ValueError(f"{function}: dim must be even, got {dim}")
    return dim


def check_base(function: str, base: float) -> float:
    """Return `base` as a float; it must be > 1 for the frequencies to fall with the pair index."""
    return check_real(function, "base", base, above=1)


def check_factor(function: str, factor: float) -> float:
    """Return an extension factor as a float; it must be > 0 and fit frequencies in float32."""
    number = check_real(function, "factor", factor, above=0)
    if not 1e-37 <= number <= 1e37:
        raise ValueError(f"{function}: factor must be between 1e-37 and 1e37, got {factor}")
    return number


def check_length(function: str, name: str, value: int) -> int:
    """Return a number of tokens as an int; it must be whole and positive."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**62:
        return value  # unchanged: torch.compile can keep a length symbolic
    number = check_real(function, name, value, above=0)
    if number != int(number):
        raise ValueError(f"{function}: {name} must be a whole number of tokens, got {value}")
    if number >= 2**62:
        raise ValueError(f"{function}: {name} must be < 2**62, got {value}")
    return int(number)


def check_seq_len(function: str, seq_len: int | Tensor) -> int | Tensor:
    """Return `seq_len`: an int > 0, or an integer tensor of shape () or (batch,).

    A tensor's values are not checked: reading them would make the host wait for the device.
    """
    if not isinstance(seq_len, Tensor):
        return check_length(function, "seq_len", seq_len)
    _check_holds_integers(function, "seq_len", seq_len)
    if seq_len.dim() > 1:
        shape = tuple(seq_len.shape)
        raise ValueError(f"{function}: seq_len must have shape () or (batch,), got {shape}")
    return seq_len.to(torch.int64)  # a trained length may be past a narrower one


def check_counts(
    function: str, name: str, values: int | Sequence[int] | Tensor, batch: int
) -> Tensor:
    """Return a positive number for every sequence: (batch, 1) int64 on the CPU."""
    if isinstance(values, Tensor):
        _check_holds_integers(function, name, values)
        if values.dim() != 1:
            shape = tuple(values.shape)
            raise ValueError(f"{function}: {name} must have shape ({batch},), got {shape}")
        values = values.tolist()
    elif isinstance(values, Integral):
        values = [values] * batch
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(
            f"{function}: {name} must be an int, or one int per sequence, got {values!r}"
        )
    if len(values) != batch:
        raise ValueError(f"{function}: {name} must have {batch} entries, got {len(values)}")
    counts = [check_count(function, name, value) for value in values]
    return torch.tensor(counts, dtype=torch.int64, device="cpu").unsqueeze(-1)


def check_choice(function: str, name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value`, which must be one of `choices`."""
    if value not in tuple(choices):
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{function}: {name} must be one of {expected}, got {value!r}")
    return value


def check_bool(function: str, name: str, value: bool) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a bool, got {value!r}")
    return value


def check_falling(function: str, high_name: str, high: float, low_name: str, low: float) -> None:
    """Check that both numbers are > 0 and that `high` is no less; between equal ones is a step."""
    check_real(function, high_name, high, above=0)
    if 0 < check_real(function, low_name, low, above=0) < 1e-30:  # divides lengths
        raise ValueError(f"{function}: {low_name} must be >= 1e-30, got {low}")
    if high < low:
        raise ValueError(f"{function}: {high_name} must be >= {low_name}, got {high} and {low}")


def check_pair_factors(
    function: str, name: str, factors: Sequence[float] | Tensor, pairs: int
) -> Tensor:
    """Return one positive factor per pair, (pairs,) float32 on the CPU, with a tensor's graph."""
    if isinstance(factors, str | bytes) or not isinstance(factors, Sequence | Tensor):
        raise TypeError(f"{function}: {name} must be a list of numbers, got {factors!r}")
    values = factors.tolist() if isinstance(factors, Tensor) else factors
    if isinstance(factors, Tensor) and factors.dim() != 1:
        raise ValueError(f"{function}: {name} must have one dimension, got {factors.dim()}")
    if len(values) != pairs:
        raise ValueError(f"{function}: {name} must have {pairs} entries, got {len(values)}")
    reals = [check_real(function, f"{name}[{i}]", value, above=0) for i, value in enumerate(values)]
    if isinstance(factors, Tensor):
        return factors.to("cpu", torch.float32)
    return torch.tensor(reals, dtype=torch.float32, device="cpu")


def check_of_pairs(function: str, name: str, values: Sequence[Any] | Tensor) -> Tensor:
    """Return numbers > 0, one a pair, as float64."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | Tensor):
        raise TypeError(f"{function}: {name} must be a list of numbers, got {values!r}")
    if isinstance(values, Tensor) and torch.compiler.is_compiling():  # no values to read
        return values.double()
    listed = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(listed, Sequence) or not listed or isinstance(listed[0], list | tuple):
        raise ValueError(f"{function}: {name} must be (pairs,) numbers, got {listed}")
    for n, value in enumerate(listed):
        check_real(function, f"{name}[{n}]", value, above=0)
    if isinstance(values, Tensor):
        return values.double()
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def check_generator(function: str, generator: torch.Generator | None) -> torch.Generator | None:
    """Return `generator`, which must be None or draw on the CPU."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeError(f"{function}: generator must be a torch.Generator or None, got {kind}")
    if generator.device.type != "cpu":
        raise ValueError(f"{function}: generator must be on the CPU, got one on {generator.device}")
    return generator


def check_device(function: str, device: torch.device | str | int | None) -> torch.device:
    """Return the device of the result; None is the CPU."""
    if device is None:
        return torch.device("cpu")
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{function}: device must be a torch device, got {device!r}") from None


def _check_holds_integers(function: str, name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{function}: {name} must hold integers, got a {x.dtype} tensor")
