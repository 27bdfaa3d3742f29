"""Methods that change which relative position a pair sees, by name: their parameters and ops."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import (
    RopeFreqs,
    dual_chunk_attention,
    methods,
    rerope_attention,
    rerope_attention_with_kvcache,
)


@dataclass(frozen=True)
class _Method:
    attention: str  # `<attention>_attention` runs it
    parameters: tuple[str, ...]
    grouped: bool = False


SCORES = {
    "rerope": _Method("rerope", ("window",)),
    "leaky_rerope": _Method("rerope", ("window", "factor")),
    "self_extend": _Method("rerope", ("window", "factor"), grouped=True),
    "dual_chunk": _Method("dual_chunk", ("chunk_size", "local_window")),
}
_OPTIONAL = ("log_n",)
_ATTENTION = {"rerope": rerope_attention, "dual_chunk": dual_chunk_attention}

# Every method that `extend` takes, and the names of its parameters.
PARAMETERS: dict[str, tuple[str, ...]] = {
    name: tuple(parameter for parameter in inspect.signature(method).parameters)
    for name, method in methods.METHODS.items()
} | {name: method.parameters + _OPTIONAL for name, method in SCORES.items()}


@dataclass(frozen=True)
class Score:
    """A score method with its parameters.

    frame: the position that cached keys are rotated to, as a rule and its number.
    """

    name: str
    attention: str
    options: Mapping[str, Any]
    frame: tuple[str, float]

    def stored(self, positions: Tensor) -> Tensor | None:
        """The positions, in float64, that keys are rotated to before a cache takes them.

        None leaves keys as they are. They are those of `keys_stored` in the attention ops.
        """
        rule, number = self.frame
        if rule == "raw":
            return None
        if rule == "chunk":
            return positions.double() % number
        slowed = positions.double() / number
        return slowed.floor() if rule == "grouped" else slowed

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, interleaved: bool, scale: float
    ) -> Tensor:
        """Attend from raw q (batch, seqlen_q, heads_q, head_dim), the last of the keys' tokens.

        k, v: (batch, seqlen_k, heads_k, head_dim), k rotated to the stored positions.
        """
        op = getattr(torch.ops.extrope, f"{self.attention}_attn_fwd")
        out, _ = op(
            q,
            k,
            v,
            freqs.inv_freq,
            softmax_scale=scale,
            attention_factor=freqs.attention_factor,
            interleaved=interleaved,
            keys_stored=True,
            **self.options,
        )
        return out

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs: RopeFreqs,
        interleaved: bool,
        scale: float,
        used: int,
        leftpad: Tensor | None,
    ) -> Tensor:
        """`attend` of a cache's last token, where `decodes` says that there is an op for it.

        used: slots of k and v in use, the padding among them.
        leftpad: (batch,) int32, or None.
        """
        return rerope_attention_with_kvcache(
            q,
            k,
            v,
            freqs,
            cache_seqlens=used,
            cache_leftpad=leftpad,
            softmax_scale=scale,
            interleaved=interleaved,
            **self.options,
        )

    @property
    def decodes(self) -> bool:
        """Whether `decode` exists for this method."""
        return self.attention == "rerope"


def bind_score(name: str, given: Mapping[str, Any], head_dim: int, dtype: torch.dtype) -> Score:
    """Return the method with its parameters, for a model's heads.

    Raises ValueError or TypeError, from here or from the attention, for parameters that do not fit.
    """
    method = SCORES[name]
    known = PARAMETERS[name]
    if unknown := [key for key in given if key not in known]:
        raise TypeError(
            f"extend: parameters of {name} must be among {', '.join(known)}, got {unknown[0]}"
        )
    if missing := [key for key in method.parameters if key not in given]:
        raise ValueError(f"extend: {name} needs {' and '.join(missing)}, which is missing")
    options = dict(given)
    if method.grouped:
        options["grouped"] = True
    # One token on the CPU: the attention itself knows best what it takes.
    token = torch.zeros(1, 1, 1, head_dim, dtype=dtype)
    _ATTENTION[method.attention](token, token, token, methods.rope(2), **options)
    if options.get("factor") == math.inf:
        del options["factor"]
    return Score(name, method.attention, options, _frame(method, options))


def _frame(method: _Method, options: Mapping[str, Any]) -> tuple[str, float]:
    if method.attention == "dual_chunk":
        return "chunk", options["chunk_size"] - options["local_window"]
    if "factor" not in options:
        return "raw", 0
    return "grouped" if method.grouped else "slow", options["factor"]
