"""The stages of a search, by pieces of full length: short ones rank methods differently.

A stage ends at the latest when a share of the budget is spent; the next one gets the rest.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...scores import SCORES
from .. import UsageError, report
from ..models import decoder_layers
from ..report import Display
from ..texts import Text
from .candidates import Candidate, published, score_methods, with_log_n
from .factors import Ladder, NoGradient, PerPair, rising
from .pieces import OBJECTIVES, Piece, cut, measure, weighted_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shares of the budget at which stages end.
_PUBLISHED, _SCORES, _REFINED, _FAR, _FACTORS = 0.1, 0.25, 0.35, 0.5, 0.6
_TRIED = 6  # published frequency methods, at most
_PIECES, _HELD_OUT_PIECES = 2, 8
_FRONT = 3  # candidates of a kind that read more than one piece
_FAR_BEHIND = 0.01  # nats on the first piece; a candidate further behind reads no other
_RATIOS = (1.5, 1.2)  # a move multiplies or divides a parameter by these: first far, then near
_STEPS, _SIZES = 8, (1.0, 0.25)  # most steps down the gradient, and their sizes (1: the limit)
_TILTS = (2.0, 1.5, 0.5)  # the fastest pair's divisor over the middle one's, tried in turn
_HOPELESS = 0.2  # nats behind YaRN on a held-out piece; a candidate further behind reads no other


class Ledger:
    """Measurements in a JSON file: each is made once, and only while there is time for it.

    path, header: as in `report.resumed`.
    budget: seconds; rows that the file already holds count too.
    """

    def __init__(self, path: Path, header: dict[str, Any], budget: float) -> None:
        self._path = path
        self.results = report.resumed(path, header)
        self.budget = budget
        self._known = {_row_key(row["of"]): row for row in self.results["rows"]}

    @property
    def spent(self) -> float:
        """The seconds spent on all measurements."""
        return sum(row["seconds"] for row in self.results["rows"])

    def known(self, of: dict[str, Any]) -> dict[str, Any] | None:
        """Return a measurement, or None if there is none yet."""
        return self._known.get(_row_key(of))

    def measured(
        self, of: dict[str, Any], share: float, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Return a measurement, made if needed; None if it would pass a share of the budget.

        The expected time is that of others of its kind.

        of: the measurement's key, with its `kind`.
        """
        if (known := self.known(of)) is not None:
            return known
        if self.spent + self._expected(of["kind"]) > share * self.budget:
            return None
        began = time.perf_counter()
        found = measure()
        seconds = round(time.perf_counter() - began, 3)
        row = json.loads(json.dumps({"of": of, **found, "seconds": seconds}))
        self._known[_row_key(of)] = row
        self.results["rows"].append(row)
        self.write()
        return row

    def _expected(self, kind: str) -> float:
        """Return the seconds to expect for a kind; a gradient takes as long as four readings."""
        rows = [(row["of"]["kind"], row["seconds"]) for row in self.results["rows"]]
        if same := [seconds for other, seconds in rows if other == kind]:
            return median(same)
        read = [seconds for other, seconds in rows if other != "gradient"]
        return (4 if kind == "gradient" else 1) * median(read or [0.0])

    def write(self) -> None:
        """Write the file."""
        report.write_results(self._path, self.results)


def _row_key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)


class _RefusedError(Exception):
    """An error: the model cannot be extended by a candidate."""


@dataclass
class Search:
    """A search: a model, texts, a length and the measurements so far.

    texts, held_out: texts to search on, and texts to decide on.
    objective: a key of `pieces.OBJECTIVES`; the search makes its number small.
    """

    model: PreTrainedModel
    ladder: Ladder
    texts: Sequence[Text]
    held_out: Sequence[Text]
    length: int
    objective: str
    seed: int
    ledger: Ledger
    display: Display

    def __post_init__(self) -> None:
        self.counts = OBJECTIVES[self.objective]
        self._refusals: list[str] = []
        # With its paper's factor: everything is compared with this.
        self.yarn = Candidate("yarn", {"factor": max(1.0, self.length / self.ladder.trained)})

    def run(self) -> list[Candidate]:
        """Return the finalists: YaRN with its paper's factor, the best of each kind, plain last.

        Kinds are published frequencies, score methods, the best of both with its parameters moved,
        and methods with a number for each pair of dims.
        """
        methods = published(self.length, self.ladder.trained, len(self.ladder.plain))
        methods = [self.yarn, *(each for each in methods if each != self.yarn)]
        frequencies = self.best(methods[:_TRIED], _PUBLISHED) or self.yarn
        scores = score_methods(self.length, self.ladder.scaled)
        score = self.best(scores, _SCORES)
        if score is None and self._refusals:
            self.display.line(f"score methods are left out: {self._refusals[0]}")
        ahead = score is not None and self.costs_less(score, frequencies, _REFINED)
        refined = self.refined(score if score and ahead else frequencies, _REFINED)
        leaky = [each for each in (refined, *scores) if each.method == "leaky_rerope"]
        far = self.far_frequencies(self.best(leaky, 0.0), _FAR)
        factors = self.factors(frequencies, _FACTORS)
        finalists = [self.yarn, far, refined, score, factors, frequencies, Candidate()]
        found = [each for each in finalists if each is not None]
        found = [each for index, each in enumerate(found) if each not in found[:index]]
        self.decide(found)
        return found

    def best(self, candidates: Sequence[Candidate], share: float) -> Candidate | None:
        """Rank candidates by the first piece, then return the best of the first few by all."""
        costs = [(self._cost(each, 0, share), each) for each in candidates]
        read = [(cost, each) for cost, each in costs if cost is not None]
        front = [each for _, each in sorted(read, key=lambda pair: pair[0])[:_FRONT]]
        best = front[0] if front else None
        for each in front[1:]:
            best = each if self.costs_less(each, best, share) else best
        return best

    def costs_less(self, tried: Candidate, than: Candidate, share: float) -> bool:
        """Compare two candidates piece by piece while there is time.

        A candidate far behind on the first piece reads no other.
        """
        behind: list[float] = []
        for piece in range(_PIECES):
            cost, other = (self._cost(each, piece, share) for each in (tried, than))
            if cost is None or other is None:
                break
            behind.append(cost - other)
            if behind[0] > _FAR_BEHIND:
                break
        return bool(behind) and fmean(behind) < 0

    def refined(self, best: Candidate, share: float) -> Candidate:
        """Move one parameter at a time, first far, then near, until no move costs less."""
        for ratio in _RATIOS:
            while (better := self._moved(best, ratio, share)) is not None:
                best = better
        if best.method in SCORES and "log_n" not in best.params:
            scaled = with_log_n(best, self.ladder.scaled)
            best = scaled if self.costs_less(scaled, best, share) else best
        return best

    def _moved(self, best: Candidate, ratio: float, share: float) -> Candidate | None:
        tried = (best.moved(name, by) for name in best.numbers for by in (ratio, 1 / ratio))
        return next((each for each in tried if self.costs_less(each, best, share)), None)

    def factors(self, start: Candidate, share: float) -> Candidate | None:
        """Return LongRoPE's factors if some cost less than the method they start from, or None."""
        freqs = self.ladder.freqs(start)
        of = self.ladder.factors(freqs.attention_factor, self.length)
        return self._descended(start, of, rising(self.ladder.log_factors(freqs)), share)

    def far_frequencies(self, start: Candidate | None, share: float) -> Candidate | None:
        """Return far frequencies if some cost less than Leaky ReRoPE, or None.

        First tilts are tried: slow pairs are slowed less and fast ones more, or the other way
        round. Then each pair goes down its gradient.
        """
        if start is None:
            return None
        of, pairs = self.ladder.divisors(start, self.length), len(self.ladder.plain)
        best, at = start, torch.full((pairs,), math.log(start.params["factor"])).double()
        for tilt in _TILTS:
            tilted = at + torch.linspace(1, -1, pairs, dtype=at.dtype) * math.log(tilt)
            if self.costs_less(of.candidate(tilted), best, share):
                best, at = of.candidate(tilted), tilted
        return self._descended(best, of, at, share) or (None if best is start else best)

    def _descended(
        self, start: Candidate, of: PerPair, at: Tensor, share: float
    ) -> Candidate | None:
        """Go down the gradient from `at` while that costs less than the start."""
        best = start
        try:
            for _ in range(_STEPS):
                if (found := self._step(of, at, best, share)) is None:
                    break
                at, best = found
        except NoGradient:
            self.display.line("no gradient reaches this model's frequencies: none are moved")
        return None if best is start else best

    def _step(
        self, of: PerPair, at: Tensor, than: Candidate, share: float
    ) -> tuple[Tensor, Candidate] | None:
        """Take a step down the gradients of all pieces; None if no size of it costs less."""
        if (gradients := self._gradients(of, at, share)) is None:
            return None
        for size in _SIZES:
            step = of.downhill(at, gradients, size)
            tried = of.candidate(step)
            if self.costs_less(tried, than, share):
                return step, tried
        return None

    def _gradients(self, of: PerPair, at: Tensor, share: float) -> Tensor | None:
        """Return the gradients of all pieces, (pieces, pairs), or None without time."""
        found = []
        for index in range(_PIECES):

            def measure(index: int = index) -> dict[str, Any]:
                piece = self._piece(self.texts, index)
                loss = partial(weighted_loss, self.model, piece, self.objective, self.display.tick)
                value, slope = of.gradient(self.model, at, loss)
                return {"loss": value, "gradient": slope.tolist()}

            self._begin(f"gradient {index + 1}")
            key = _of(of.candidate(at), "gradient", index)
            if (row := self.ledger.measured(key, share, measure)) is None:
                return None
            found.append(torch.tensor(row["gradient"], dtype=at.dtype))
        return torch.stack(found)

    def decide(self, finalists: Sequence[Candidate]) -> None:
        """Measure finalists on held-out pieces, piece by piece, while there is time."""
        for index in range(_HELD_OUT_PIECES):
            for candidate in finalists:
                if index and self._is_hopeless(candidate):
                    continue
                if self._read(candidate, index, "held-out", 1.0) is None:
                    return

    def _is_hopeless(self, candidate: Candidate) -> bool:
        """Return True if one piece is enough: the candidate is far behind YaRN."""
        row, yarn = (self.on_held_out(each)[0] for each in (candidate, self.yarn))
        return row[self.counts] > yarn[self.counts] + _HOPELESS

    def on_held_out(self, candidate: Candidate) -> list[dict[str, Any]]:
        """Return a finalist's measurements in the order of pieces."""
        of = (_of(candidate, "held-out", index) for index in range(_HELD_OUT_PIECES))
        return [row for each in of if (row := self.ledger.known(each)) is not None]

    def _cost(self, candidate: Candidate, index: int, share: float) -> float | None:
        """Return the number to make small; None without time, or if the model refuses."""
        row = self._read(candidate, index, "search", share)
        return None if row is None else row[self.counts]

    def _read(
        self, candidate: Candidate, index: int, kind: str, share: float
    ) -> dict[str, Any] | None:
        texts = self.held_out if kind == "held-out" else self.texts

        def measured() -> dict[str, Any]:
            try:
                extended = candidate.extending(self.model)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise _RefusedError(str(error)) from error
            with extended:
                found = measure(self.model, self._piece(texts, index), self.display.tick)
            if not math.isfinite(found[self.counts]):
                raise UsageError(
                    f"the loss under {candidate.name} is {found[self.counts]}, "
                    "which ranks with no other"
                )
            return found

        of = _of(candidate, kind, index)
        new = self.ledger.known(of) is None
        self._begin(candidate.name)
        try:
            row = self.ledger.measured(of, share, measured)
        except _RefusedError as error:
            self._refusals.append(str(error))
            return None
        if row is not None and new:
            place = f"{kind} {index + 1}"
            self.display.line(f"{place:<10} {row[self.counts]:.4f}  {candidate.name}")
        return row

    def _piece(self, texts: Sequence[Text], index: int) -> Piece:
        text = texts[index % len(texts)]
        return cut(text, self.length, index // len(texts), self.seed)

    def _begin(self, name: str) -> None:
        self.display.begin(name, len(decoder_layers(self.model)))


def _of(candidate: Candidate, kind: str, index: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "method": candidate.method,
        "params": candidate.params,
        "piece": index,
    }
