"""Candidates of a search: the plain model, or a method with its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...integrations.transformers import extend
from ..options import method_params
from ..report import name_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Candidate:
    """A method and its parameters for `extend`; `plain` is the model without a method."""

    method: str = "plain"
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in tables."""
        return name_of(self.method, self.params)

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

    def moves(self, ratio: float) -> Iterator[Candidate]:
        """Yield the method with one of its numbers multiplied or divided by a ratio, for each.

        A whole number stays whole, and SelfExtend's window stays a multiple of its groups.
        """
        for name, value in self.params.items():
            if name == "log_n" or not isinstance(value, int | float):
                continue
            for moved in (value * ratio, value / ratio):
                if isinstance(value, int):
                    moved = math.ceil(moved) if moved > value else max(1, math.floor(moved))
                params = self.params | {name: moved}
                if self.method == "self_extend":
                    params["window"] -= params["window"] % params["factor"]
                yield Candidate(self.method, params)

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
