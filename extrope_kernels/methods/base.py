"""`RopeFreqs`, the result of every method, and the table of powers that most methods start from."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device


@dataclass(frozen=True, eq=False, repr=False)
class RopeFreqs:
    """Speed of rotation of each pair of dims, and its amplitude. Equal by value.

    inv_freq: (rotary_dim/2,) float32: radians per position of each pair; (batch, rotary_dim/2) when
        a method was given one `seq_len` per sequence; (batch or 1, heads, rotary_dim/2) where heads
        differ (`ms_poe`).
    attention_factor: multiplies the rotated dims of q and of k, hence the logits by its square.
    log_decay: (rotary_dim/2,) float32 or None. When given, q dims are multiplied by
        exp(p * log_decay) and k dims by exp(-p * log_decay) at position p (XPOS), p counted from
        decay_origin.
    axes: (rotary_dim/2,) int32 or None. The row of positions (axes, batch, seqlen) that each pair
        takes its position from (`axial`, mRoPE: see `with_sections`).
    decay_origin: the position at which log_decay changes nothing. Logits do not depend on it if
        q and k share it; it must be near enough to keep the amplitudes within the dtype.
    steepest_decay: the largest |log_decay|, known on the host: an overflowing amplitude is refused
        without waiting for the device. 0 if unknown; then nothing is refused.

    Raises: TypeError if inv_freq is no Tensor, as a list or a NumPy array is not.
    """

    inv_freq: Tensor
    attention_factor: float = 1.0
    log_decay: Tensor | None = None
    axes: Tensor | None = None
    decay_origin: float = 0.0
    steepest_decay: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.inv_freq, Tensor):
            raise TypeError(
                f"RopeFreqs: inv_freq must be a Tensor, got {type(self.inv_freq).__name__}"
            )

    def __repr__(self) -> str:
        if not self.inv_freq.dim() or not isinstance(self.attention_factor, float):
            wrong = f"inv_freq={self.inv_freq!r}, attention_factor={self.attention_factor!r}"
            return f"RopeFreqs({wrong})"  # what an error may have to show
        *sets, pairs = self.inv_freq.shape
        told = [" x ".join(map(str, (*sets, f"{pairs} pairs")))]
        with suppress(RuntimeError):  # in a trace there are no values
            lengths = (2 * math.pi / self.inv_freq.detach().double()).abs()
            low, high = (x.item() for x in lengths.aminmax())
            told.append(f"wavelengths {low:.3g} to {high:.3g}")
        told.append(f"attention_factor {self.attention_factor:.4g}")
        told += [name for name in ("log_decay", "axes") if getattr(self, name) is not None]
        return f"RopeFreqs({', '.join(told)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RopeFreqs):
            return NotImplemented
        numbers = [(each.attention_factor, each.decay_origin) for each in (self, other)]
        names = ("inv_freq", "log_decay", "axes")
        return numbers[0] == numbers[1] and all(
            _same(getattr(self, name), getattr(other, name)) for name in names
        )

    def __hash__(self) -> int:
        return hash((self.inv_freq.shape, self.attention_factor))

    @property
    def kwargs(self) -> dict[str, Any]:
        """What `torch.ops.extrope.rope_fwd` takes by name beside inv_freq.

        torch.ops.extrope.rope_fwd(q, k, freqs.inv_freq, **freqs.kwargs)
        """
        given: dict[str, Any] = {"attention_factor": self.attention_factor}
        if self.log_decay is not None:
            given |= {"log_decay": self.log_decay, "decay_origin": self.decay_origin}
        return given if self.axes is None else {**given, "axes": self.axes}

    def for_keys(self) -> RopeFreqs:
        """Return the frequencies for keys that `apply_rope` rotates alone: the decay negated."""
        return self if self.log_decay is None else replace(self, log_decay=-self.log_decay)

    def to(self, device: torch.device | str | int) -> RopeFreqs:
        """Return the same frequencies with their tensors on `device`, to the bit."""
        device = check_device("RopeFreqs.to", device)
        log_decay = None if self.log_decay is None else self.log_decay.to(device)
        axes = None if self.axes is None else self.axes.to(device)
        return replace(self, inv_freq=self.inv_freq.to(device), log_decay=log_decay, axes=axes)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b.to(a.device))


def exponents(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 2i / dim for every pair i: (dim/2,) float32."""
    return torch.arange(0, dim, 2, device=device).float() / dim


def base_powers(dim: int, base: float) -> Tensor:
    """Return base ** (2i / dim) for every pair i: (dim/2,) float32 on the CPU.

    Computed on the CPU always: another device's pow may differ in the last bit from the table that
    checkpoints were trained with.
    """
    return base ** exponents(dim)


def rope_inv_freq(dim: int, base: float) -> Tensor:
    """Return base ** (-2i / dim) for every pair i: (dim/2,) float32 on the CPU."""
    return 1.0 / base_powers(dim, base)


def trained_inv_freq(method: str, dim: int, base: float, over: RopeFreqs | None) -> Tensor:
    """Return the frequencies that `method` scales: those of `over`, else RoPE's at `base`.

    (dim/2,) float32 on the CPU.
    """
    if over is None:
        return rope_inv_freq(dim, base)
    inv_freq = check_freqs(method, over, "over").inv_freq
    if inv_freq.shape != (dim // 2,) or over.log_decay is not None:
        decay = "" if over.log_decay is None else " with log_decay (XPOS)"
        raise ValueError(
            f"{method}: over must hold dim/2 = {dim // 2} frequencies without log_decay, "
            f"got {tuple(inv_freq.shape)}{decay}"
        )
    return inv_freq.to("cpu", torch.float32)


def scaled_over(
    method: str, scaled: Tensor, dim: int, base: float, over: RopeFreqs | None
) -> Tensor:
    """Return over's frequencies, scaled pair by pair as `scaled` is of RoPE's at `base`.

    scaled: (..., dim/2) float32, returned to the bit where `over` is None or plain RoPE.
    """
    plain = rope_inv_freq(dim, base)
    trained = trained_inv_freq(method, dim, base, over)
    if over is None or torch.equal(trained, plain):
        return scaled
    ratio = scaled.double() / copy_to(plain, scaled.device).double()
    return (copy_to(trained, scaled.device) * ratio).float()


def trained_pairs(
    method: str, dim: int, base: float, over: RopeFreqs | None
) -> tuple[Tensor, Tensor]:
    """Return 1 / frequency of every pair, and its index in plain RoPE at `base`: (dim/2,) each.

    A pair of `over` has the real index at which plain RoPE rotates as fast; one that does not
    rotate has an infinite one. Over plain RoPE both are plain RoPE's, to the bit.
    """
    powers = base_powers(dim, base)
    trained = trained_inv_freq(method, dim, base, over)
    if over is None or torch.equal(trained, 1.0 / powers):
        return powers, torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    powers = 1.0 / trained.double()
    return powers, (powers.log() * (dim / (2 * math.log(base)))).float()


def with_trained(over: RopeFreqs | None, inv_freq: Tensor, factor: float = 1.0) -> RopeFreqs:
    """Return scaled frequencies with the amplitude and the axes that the model was trained with."""
    if over is None:
        return RopeFreqs(inv_freq, factor)
    return RopeFreqs(inv_freq, over.attention_factor * factor, axes=over.axes)


def copy_to(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small table from the CPU to `device` without making the host wait for the device."""
    return table.to(device, non_blocking=True)


def check_freqs(function: str, freqs: RopeFreqs, name: str = "freqs") -> RopeFreqs:
    """Check another method's frequencies before `function` changes them."""
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"{function}: {name} must be a RopeFreqs, got {type(freqs).__name__}")
    if freqs.inv_freq.dim() == 0:
        raise TypeError(
            f"{function}: inv_freq must be a Tensor of frequencies, got {freqs.inv_freq!r}"
        )
    return freqs
