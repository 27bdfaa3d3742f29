"""Candidates of a search: the plain model, or a method with its parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...integrations.transformers import extend
from ...methods import METHODS
from ...scores import SCORES
from ..options import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIXED = ("log_n", "seq_len")  # lengths of the model's training


@dataclass(frozen=True)
class Candidate:
    """A method and its parameters for `extend`; `plain` is the model without a method."""

    method: str = "plain"
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in tables, without numbers per pair, which would fill them."""
        shown = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._short()]
        return " ".join([self.method, *shown])

    @property
    def call(self) -> str:
        """The line of Python that extends a model by this candidate."""
        if self.method == "plain":
            return "model"
        given = "".join(f", {name}={value!r}" for name, value in self.params.items())
        return f'extend(model, "{self.method}"{given})'

    def extending(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Extend a model until the end of a `with` block."""
        if self.method == "plain":
            return nullcontext()
        return extend(model, self.method, **self.params)

    def moved(self, name: str, ratio: float) -> Candidate:
        """Return the method with one of its numbers multiplied by a ratio.

        A whole number stays whole, and SelfExtend's window stays a multiple of its groups.
        """
        value = self.params[name]
        changed: float = value * ratio
        if isinstance(value, int):
            changed = max(1, math.ceil(changed) if ratio > 1 else math.floor(changed))
        params = self.params | {name: changed}
        if self.method == "self_extend":
            params["window"] -= params["window"] % params["factor"]
        return Candidate(self.method, params)

    @property
    def numbers(self) -> list[str]:
        """The parameters that a search may move."""
        return [
            name
            for name, value in self.params.items()
            if isinstance(value, int | float) and name not in _FIXED
        ]

    def _short(self) -> list[tuple[str, Any]]:
        kept = self.params.items()
        return [(k, v) for k, v in kept if not isinstance(v, list) and k != "seq_len"]


def published(length: int, trained: int, pairs: int) -> list[Candidate]:
    """Return the frequency methods over a small grid of their parameters, the likeliest first.

    Factors are length / trained, which is enough by the papers, and larger ones, since some methods
    reach less far than their factor.

    pairs: pairs of dims in a head.
    """
    factor = max(1.0, length / trained)
    factors = (factor, 1.5 * factor, 2 * factor)
    by_factor = ("yarn", "ntk_aware", "ntk_by_parts", "llama3", "ntk_mixed")
    return [
        *(Candidate(method, {"factor": factor}) for method in by_factor),
        Candidate("giraffe_power", {"power": 0.5}),
        Candidate("yarn", {"factor": factor, "beta_fast": 16.0}),
        Candidate("ntk_by_parts", {"factor": factor, "variant": "paper"}),
        *(Candidate(method, {"factor": factors[1]}) for method in by_factor),
        Candidate("yarn", {"factor": factors[2]}),
        Candidate("ntk_aware", {"factor": factors[2]}),
        *(Candidate(method, {"factor": factor}) for method in _that_need_a_factor(by_factor)),
        Candidate("giraffe_truncation", {"truncate_pos": trained}),
        Candidate("cope", {"clip": 20 * pairs // 64}),
        Candidate("proportional", {"partial_rotary_factor": 0.75}),
    ]


def _that_need_a_factor(known: Sequence[str]) -> list[str]:
    """Return the other methods that require a factor and take no length."""

    def needs(method: Callable[..., Any]) -> bool:
        parameters = inspect.signature(method).parameters
        factor = parameters.get("factor")
        return factor is not None and factor.default is factor.empty and "seq_len" not in parameters

    return [name for name, method in METHODS.items() if name not in known and needs(method)]


def score_methods(length: int, trained: int) -> list[Candidate]:
    """Return the score methods over a small grid of windows and factors, the likeliest first.

    Their other parameters are those of `eval`. The best is tried with log_n too: `with_log_n`.
    """
    usual = {
        method: Candidate(method, Plan([method], [length]).method_params(method, length, trained))
        for method in SCORES
    }
    quarter, half = max(1, trained // 4), max(1, trained // 2)
    # Far tokens in groups then fill three quarters of the distances beyond the window.
    factor = max(2, math.ceil(4 * (length - half) / (3 * (trained - half))))
    wide = Candidate("self_extend", {"window": factor * max(1, half // factor), "factor": factor})
    steep = Candidate("leaky_rerope", {"window": quarter, "factor": 4.0})
    rerope = [Candidate("rerope", {"window": max(1, each * trained // 8)}) for each in (6, 2, 1)]
    string = Candidate("string", {"shift": trained, "window": min(128, trained)})
    known = [usual.pop(x) for x in ("dual_chunk", "self_extend", "rerope", "leaky_rerope")]
    usual["string"] = string
    return [steep, wide, *known, *rerope, *usual.values()]


def with_log_n(candidate: Candidate, trained: int) -> Candidate:
    """Return a score method that also scales queries by the logarithm of their position."""
    return Candidate(candidate.method, candidate.params | {"log_n": trained})
