"""The stages of a search, by pieces of full length: short ones rank methods differently.

Stages share most of the budget, first come, first served: score methods, which cost less, before
frequencies. Held-out text gets the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...scores import SCORES
from .. import UsageError
from ..models import decoder_layers, training_length, unscaled_length
from ..options import refusal
from ..report import Display, Rows
from ..texts import Text
from .candidates import Candidate, frequency_methods, score_methods
from .pieces import OBJECTIVES, cut, measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEARCHED = 0.6  # share of the budget at which the search ends
_PIECES, _HELD_OUT_PIECES = 2, 8
_FRONT = 3  # candidates of a kind that read more than one piece
_FAR_BEHIND = 0.01  # nats on the first piece; a candidate further behind reads no other
_RATIOS = (1.5, 1.2)  # a move multiplies or divides a parameter by these: first far, then near
_TILTS = (2.0, 1.5, 0.5)  # the fastest pair's divisor over the middle one's, tried in turn
_HOPELESS = 0.2  # nats behind YaRN on a held-out piece; a candidate further behind reads no other


@dataclass
class Search:
    """A search: a model, texts and the measurements so far.

    pairs: pairs of dims in a head.
    texts: those to search on, and those to decide on, by the kind of measurement.
    rows: of search.json, which has the length, objective and seed.
    budget: seconds; rows that the file already holds count too.
    """

    model: PreTrainedModel
    pairs: int
    texts: dict[str, Sequence[Text]]
    rows: Rows
    budget: float
    display: Display
    refusals: list[str] = field(default_factory=list)

    @property
    def counts(self) -> str:
        """The number of a measurement that the search makes small."""
        return OBJECTIVES[self.rows.results["objective"]]

    @property
    def spent(self) -> float:
        """The seconds spent on all measurements."""
        return sum(row["seconds"] for row in self.rows.results["rows"])

    @property
    def usual(self) -> float:
        """The seconds that one measurement takes; a guess before the first."""
        rows = self.rows.results["rows"]
        return self.spent / len(rows) if rows else self.budget / 60

    def run(self) -> list[Candidate]:
        """Return the finalists: YaRN with its paper's factor, the best of each kind, plain last.

        Kinds are published frequencies, score methods, the best of both with its parameters moved,
        and far frequencies.
        """
        length = self.rows.results["length"]
        scores = score_methods(length, training_length(self.model))
        score = self.best(scores)
        if score is None and self.refusals:
            self.display.line(f"score methods are left out: {self.refusals[0]}")
        published = frequency_methods(length, unscaled_length(self.model))
        frequencies = self.best(published) or published[0]
        ahead = score is not None and self.costs_less(score, frequencies)
        refined = self.refined(score if score and ahead else frequencies)
        far = self.far_frequencies([refined, *scores])
        found = [published[0], far, refined, score, frequencies, Candidate()]
        finalists = [
            each
            for index, each in enumerate(found)
            if each is not None and each not in found[:index]
        ]
        self.decide(finalists)
        return finalists

    def best(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Rank candidates by the first piece, then return the best of the first few by all."""
        costs = [(self._cost(each, 0), each) for each in candidates]
        read = [(cost, each) for cost, each in costs if cost is not None]
        front = [each for _, each in sorted(read, key=lambda pair: pair[0])[:_FRONT]]
        best = front[0] if front else None
        for each in front[1:]:
            best = each if self.costs_less(each, best) else best
        return best

    def costs_less(self, tried: Candidate, than: Candidate) -> bool:
        """Compare two candidates piece by piece while there is time.

        A candidate far behind on the first piece reads no other.
        """
        behind: list[float] = []
        for piece in range(_PIECES):
            cost, other = (self._cost(each, piece) for each in (tried, than))
            if cost is None or other is None:
                break
            behind.append(cost - other)
            if behind[0] > _FAR_BEHIND:
                break
        return bool(behind) and fmean(behind) < 0

    def refined(self, best: Candidate) -> Candidate:
        """Move one parameter at a time, first far, then near, until no move costs less."""
        for ratio in _RATIOS:
            while (better := self._moved(best, ratio)) is not None:
                best = better
        if best.method in SCORES and "log_n" not in best.params:
            log_n = {"log_n": training_length(self.model)}
            scaled = Candidate(best.method, best.params | log_n)
            best = scaled if self.costs_less(scaled, best) else best
        return best

    def _moved(self, best: Candidate, ratio: float) -> Candidate | None:
        return next((each for each in best.moves(ratio) if self.costs_less(each, best)), None)

    def far_frequencies(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Return far frequencies if some cost less than the best Leaky ReRoPE, or None.

        Fast pairs are slowed more and slow ones less, or the other way round.
        """
        start = self.best([each for each in candidates if each.method == "leaky_rerope"])
        if start is None:
            return None
        best = start
        for tilted in (start.tilted(tilt, self.pairs) for tilt in _TILTS):
            best = tilted if self.costs_less(tilted, best) else best
        return None if best is start else best

    def decide(self, finalists: Sequence[Candidate]) -> None:
        """Measure finalists on held-out pieces, piece by piece, while there is time.

        Of one that is far behind the first, YaRN, a single piece is enough.
        """
        for index in range(_HELD_OUT_PIECES):
            for candidate in finalists:
                if index:
                    row, yarn = (self.on_held_out(each)[0] for each in (candidate, finalists[0]))
                    if row[self.counts] > yarn[self.counts] + _HOPELESS:
                        continue
                if self._read(candidate, index, "held-out") is None:
                    return

    def on_held_out(self, candidate: Candidate) -> list[dict[str, Any]]:
        """Return a finalist's measurements in the order of pieces."""
        of = (_of(candidate, "held-out", index) for index in range(_HELD_OUT_PIECES))
        return [row for each in of if (row := self.rows.known(each)) is not None]

    def _cost(self, candidate: Candidate, index: int) -> float | None:
        """Return the number to make small; None without time, or if the model refuses."""
        row = self._read(candidate, index, "search")
        return None if row is None else row[self.counts]

    def _read(self, candidate: Candidate, index: int, kind: str) -> dict[str, Any] | None:
        of = _of(candidate, kind, index)
        if (known := self.rows.known(of)) is not None:
            return known
        if self.spent >= self.budget * (_SEARCHED if kind == "search" else 1):
            return None
        plain = candidate.method == "plain"
        if not plain and (why := refusal(self.model, candidate.method, candidate.params)):
            self.refusals.append(why)
            return None
        row = self.rows.add(of, partial(self._measured, candidate, index, kind))
        self.display.line(f"{f'{kind} {index + 1}':<10} {row[self.counts]:.4f}  {candidate.name}")
        return row

    def _measured(self, candidate: Candidate, index: int, kind: str) -> dict[str, Any]:
        texts, asked = self.texts[kind], self.rows.results
        text = texts[index % len(texts)]
        piece = cut(text, asked["length"], index // len(texts), asked["seed"])
        with candidate.extending(self.model):
            ticks = len(decoder_layers(self.model))
            self.display.begin(candidate.name, ticks, min(self.budget, self.spent + self.usual))
            found = measure(self.model, piece)
        if not math.isfinite(cost := found[self.counts]):
            told = f"the loss under {candidate.name} is {cost}, which ranks with no other"
            raise UsageError(told)
        return found


def _of(candidate: Candidate, kind: str, index: int) -> dict[str, Any]:
    of = {"kind": kind, "method": candidate.method, "params": candidate.params, "piece": index}
    return {"of": of}
