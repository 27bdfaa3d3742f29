"""Candidates of a search: the plain model, or a method with its parameters."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...integrations.transformers import extend
from ...scores import SCORES
from ..options import method_params

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Candidate:
    """A method and its parameters for `extend`; `plain` is the model without a method."""

    method: str = "plain"
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in tables, without numbers per pair, which would fill them."""
        shown = {k: v for k, v in self.params.items() if not isinstance(v, list)}
        numbers = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()]
        return " ".join([self.method, *numbers])

    @property
    def call(self) -> str:
        """The line of Python that extends a model by this candidate."""
        if self.method == "plain":
            return "model"
        given = "".join(f", {name}={value!r}" for name, value in self.params.items())
        return f'extend(model, "{self.method}"{given})'

    @property
    def is_score(self) -> bool:
        """True for a score method."""
        return self.method in SCORES

    def extending(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Extend a model until the end of a `with` block."""
        if self.method == "plain":
            return nullcontext()
        return extend(model, self.method, **self.params)

    def moves(self, ratio: float) -> list[Candidate]:
        """Return the method with one of its numbers multiplied or divided by a ratio, for each."""
        movable = {
            name: value
            for name, value in self.params.items()
            if isinstance(value, int | float) and name != "log_n"
        }
        return [self._moved(n, x, by) for n, x in movable.items() for by in (ratio, 1 / ratio)]

    def _moved(self, name: str, value: float, by: float) -> Candidate:
        """Move a number: a whole one stays whole, and SelfExtend's window a multiple of groups."""
        changed: float = value * by
        if isinstance(value, int):
            changed = max(1, math.ceil(changed) if by > 1 else math.floor(changed))
        params = self.params | {name: changed}
        if self.method == "self_extend":
            params["window"] -= params["window"] % params["factor"]
        return Candidate(self.method, params)

    def with_log_n(self, trained: int) -> Candidate:
        """Return a score method that also scales queries by the logarithm of their position."""
        return Candidate(self.method, self.params | {"log_n": trained})

    def tilted(self, by: float, pairs: int) -> Candidate:
        """Return Leaky ReRoPE with a divisor for each pair of dims in place of its factor.

        by: the fastest pair's divisor over the factor, which is the middle one's.
        """
        rest = {name: value for name, value in self.params.items() if name != "factor"}
        steps = [1 - 2 * pair / max(1, pairs - 1) for pair in range(pairs)]
        divisors = [round(self.params["factor"] * by**step, 3) for step in steps]
        return Candidate("far_frequencies", rest | {"divisors": divisors})


def frequency_methods(length: int, trained: int) -> list[Candidate]:
    """Return the published frequency methods that were best on SmolLM2, the likeliest first.

    The first is YaRN with its paper's factor.
    """
    factor = max(1.0, length / trained)
    by_factor = ("yarn", "ntk_aware", "ntk_by_parts", "llama3", "ntk_mixed")
    return [
        *(Candidate(method, {"factor": factor}) for method in by_factor),
        Candidate("giraffe_power", {"power": 0.5}),
    ]


def score_methods(length: int, trained: int) -> list[Candidate]:
    """Return the score methods that were best on SmolLM2, the likeliest first.

    After the first two they are those of `eval`.
    """
    half = max(1, trained // 2)
    # Far tokens in groups then fill three quarters of the distances beyond the window.
    factor = max(2, math.ceil(4 * (length - half) / (3 * (trained - half))))
    usual = ("dual_chunk", "self_extend", "rerope", "leaky_rerope")
    return [
        Candidate("leaky_rerope", {"window": max(1, trained // 4), "factor": 4.0}),
        Candidate("self_extend", {"window": factor * max(1, half // factor), "factor": factor}),
        *(Candidate(method, method_params(method, length, trained)) for method in usual),
    ]
