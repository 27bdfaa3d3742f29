"""A model's own tables, cosines and sines or complex numbers, of other frequencies.

Whatever a rotary embedding does with its frequencies, axes of positions, orders of the dims, a
tensor instead of two, it does with others as well: a twin of it holds them, in float32, and all
else is the model's own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs


class Tables:
    """What a rotary embedding returns for other frequencies: call it as the model's own.

    order: where the model holds its frequencies in another order than that of the pairs, the
        number of the pair that each is for.
    """

    def __init__(
        self,
        rotary: nn.Module,
        layer_type: str | None,
        freqs: RopeFreqs,
        order: Tensor | None = None,
    ) -> None:
        self.freqs = freqs
        if order is not None:
            freqs = replace(freqs, inv_freq=freqs.inv_freq[..., order.to(freqs.inv_freq.device)])
        self.options = {} if layer_type is None else {"layer_type": layer_type}
        self.twin = _twin(rotary, layer_type, freqs)

    def __call__(self, x: Tensor, position_ids: Tensor) -> Any:
        try:
            return type(self.twin).forward(self.twin, x, position_ids, **self.options)
        except IndexError:
            # Before transformers 5.19, those of three axes take no positions of one.
            if position_ids.dim() != 2:
                raise
            return self(x, position_ids.expand(3, -1, -1))


def prefix_of(layer_type: str | None) -> str:
    """Return what the names of a rotary embedding's buffers for a kind of layers begin with."""
    return "" if layer_type is None else f"{layer_type}_"


def _twin(rotary: nn.Module, layer_type: str | None, freqs: RopeFreqs) -> nn.Module:
    """Return the rotary embedding with other frequencies, which no length changes."""
    twin = copy.copy(rotary)
    attributes = vars(twin)
    attributes.pop("forward", None)
    attributes["_buffers"] = dict(rotary._buffers)
    prefix = prefix_of(layer_type)
    kind = "default" if layer_type is None else {**rotary.rope_type, layer_type: "default"}
    name = f"{prefix}inv_freq"
    holder = attributes["_buffers"] if name in rotary._buffers else attributes
    holder[name] = freqs.inv_freq
    attributes[f"{prefix}attention_scaling"] = freqs.attention_factor
    attributes["rope_type"] = kind
    # Some ask for their frequencies again in every forward.
    attributes["rope_init_fn"] = partial(_given, freqs)
    if layer_type is None:
        attributes["config"] = config = copy.copy(rotary.config)
        config.rope_parameters = {**config.rope_parameters, "rope_type": "default"}
    return twin


def _given(freqs: RopeFreqs, *_: Any, **__: Any) -> tuple[Tensor, float]:
    return freqs.inv_freq, freqs.attention_factor


def trial_numbers(first: float, last: float, count: int) -> Tensor:
    """Evenly spaced, whatever torch's default dtype and device are."""
    return torch.linspace(first, last, count, dtype=torch.float32, device="cpu")


def change_of_tables(rotary: nn.Module, layer_type: str | None) -> bool:
    """Try other frequencies out; return whether the tables are one tensor, not (cos, sin).

    Twice the frequencies at a position must be what the frequencies are at twice the position.
    Raises ValueError where they are not: then they are not all that the angle is made of.
    """
    pairs = getattr(rotary, f"{prefix_of(layer_type)}inv_freq").shape[-1]
    inv_freq = trial_numbers(0.2, 1.1, pairs)
    positions = torch.tensor([[0, 1, 5, 11]], device="cpu")
    x = inv_freq.new_zeros(1, 4, 2 * pairs)

    def tables(inv_freq: Tensor, positions: Tensor, factor: float = 1.0) -> list[Tensor]:
        made = Tables(rotary, layer_type, RopeFreqs(inv_freq, factor))(x, positions)
        return [made] if isinstance(made, Tensor) else list(made)

    with torch.no_grad():
        far, fast = tables(inv_freq, 2 * positions), tables(2 * inv_freq, positions)
        loud, near = tables(inv_freq, 2 * positions, 3.0), tables(inv_freq, positions)
    for a, b, c, d in zip(far, fast, loud, near, strict=True):
        as_expected = torch.allclose(a, b, atol=1e-4) and torch.allclose(c, 3 * a, atol=1e-4)
        if not as_expected or torch.allclose(a, d, atol=1e-4):
            raise ValueError("its angles are not its frequencies times the positions")
    return len(far) == 1
