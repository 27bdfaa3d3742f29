"""The search itself: from many candidates on few tokens to few on held-out pieces of full length.

Each stage may go on until a share of the budget is spent; what one leaves is the next one's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import report
from ..loss import token_losses
from ..models import decoder_layers
from ..report import Display
from ..texts import Text
from .candidates import Candidate, published, score_methods, supported, with_log_n
from .factors import Descent, Ladder, rising
from .losses import NoGradient, finite, gradient, last_loss, short_piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shares of the budget by whose end a stage is over.
_GRID, _PUBLISHED, _FACTORS, _FULL_LENGTH, _HELD_OUT = 0.1, 0.27, 0.42, 0.57, 1.0
_FIRST_PIECES, _PIECES, _HELD_OUT_PIECES = 3, 8, 8
# Nats by which short pieces have to set a method back before its full length is not looked at: they
# have too few keys to tell good ones apart.
_FAR_BEHIND = 0.2
_TRIED_WHOLE = 6  # published methods at full length, at most
_STEPS, _GRADIENTS = 12, 4  # at most so many steps, each down so many gradients
# Short pieces tell in which direction factors get better, full lengths how far to go.
_OF_THE_WAY = (0.5, 1.0, 0.25)
# Of a text's tokens, those whose loss counts: of short pieces all behind the gap.
_LAST, _LAST_OF_SHORT = 0.25, 0.5


class Ledger:
    """Measurements in a JSON file, made once each and only while there is time for them.

    path, header: as in `report.resumed`.
    budget: seconds, those of the rows that the file holds already among them.
    """

    def __init__(self, path: Path, header: dict[str, Any], budget: float) -> None:
        self._path = path
        self.results = report.resumed(path, header)
        self.budget = budget
        self._known = {_row_key(row["of"]): row for row in self.results["rows"]}

    @property
    def spent(self) -> float:
        """The seconds that all measurements took."""
        return sum(row["seconds"] for row in self.results["rows"])

    def measured(
        self, of: dict[str, Any], share: float, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Return what was measured, or measure it; None if that would pass a share of the budget.

        It is expected to take as long as others of its kind. of: what it is, `kind` among it.
        """
        if (known := self._known.get(_row_key(of))) is not None:
            return known
        took = [r["seconds"] for r in self.results["rows"] if r["of"]["kind"] == of["kind"]]
        if self.spent + (median(took) if took else 0.0) > share * self.budget:
            return None
        began = time.perf_counter()
        found = measure()
        seconds = round(time.perf_counter() - began, 3)
        row = json.loads(json.dumps({"of": of, **found, "seconds": seconds}))
        self._known[_row_key(of)] = row
        self.results["rows"].append(row)
        report.write_results(self._path, self.results)
        return row

    def conclude(self, found: dict[str, Any]) -> None:
        """Add what the measurements say to the file."""
        report.write_results(self._path, self.results | found)


def _row_key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)


class Search:
    """A model, texts and a length, and what has been measured of them.

    texts, held_out: to search on, and to decide on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ladder: Ladder,
        texts: Sequence[Text],
        held_out: Sequence[Text],
        length: int,
        seed: int,
        ledger: Ledger,
        display: Display,
    ) -> None:
        self.model, self.ladder = model, ladder
        self.texts, self.held_out = texts, held_out
        self.length, self.seed = length, seed
        self.ledger, self.display = ledger, display
        self._best = float("inf"), ""

    def run(self) -> tuple[list[Candidate], list[Candidate]]:
        """Return the published frequency methods that may do, and the finalists."""
        likely = self.grid()
        searched = self.factors(self.best_published(likely))
        finalists = self.full_length(likely, searched)
        self.decide(finalists)
        return likely, finalists

    def grid(self) -> list[Candidate]:
        """Return YaRN, and the frequency methods that are not far behind on short pieces.

        The likeliest first, as `published` has them.
        """
        yarn, pairs = self.yarn(), len(self.ladder.plain)
        others = published(self.length, self.ladder.trained, pairs)
        tried = [yarn, *(each for each in others if each != yarn)]
        means = [self.mean_short(each, _FIRST_PIECES, _GRID) for each in tried]
        far = min((mean for mean in means if mean is not None), default=0.0) + _FAR_BEHIND
        near = [mean is not None and mean <= far for mean in means[1:]]
        return [yarn, *compress(tried[1:], near)]

    def best_published(self, likely: Sequence[Candidate]) -> Candidate:
        """Return the best by a piece of full length."""
        for candidate in likely[:_TRIED_WHOLE]:
            self._on_search_text(candidate, _PUBLISHED)
        return self._best_at_full_length(likely) or likely[0]

    def factors(self, start: Candidate) -> list[Candidate]:
        """Return LongRoPE's factors for this model, found from those of another method.

        With YaRN's amplitude, and with that of the start where it has another: short pieces do not
        tell how far attention is thinned out over the keys of a long text. Nor do they how far to
        go: factors on half and a quarter of the way come with those that cost least.
        """
        freqs = self.ladder.freqs(start)
        logs, amplitude = rising(self.ladder.log_factors(freqs)), freqs.attention_factor
        self.display.line(f"factors per pair, from those of {start.name}")
        try:
            found = self._improved(Descent(logs, self.ladder.plain * self.length), amplitude)
        except NoGradient:
            self.display.line("no gradient reaches this model's frequencies: no factors are found")
            return []
        if found is None:
            return []
        amplitudes = self.ladder.freqs(self.yarn()).attention_factor, amplitude
        return [
            self.ladder.longrope(logs + share * (found - logs), each)
            for share in _OF_THE_WAY
            for each in dict.fromkeys(amplitudes)
        ]

    def yarn(self) -> Candidate:
        """Return YaRN by its paper, which everything is compared with."""
        return Candidate("yarn", {"factor": max(1.0, self.length / self.ladder.trained)})

    def _improved(self, descent: Descent, amplitude: float) -> Tensor | None:
        """Return the factors of the lowest loss on the same short pieces, None without any."""
        start = descent.log_factors
        best = self.mean_short(self.ladder.longrope(start, amplitude), _PIECES, _FACTORS)
        for step in range(_STEPS):
            if best is None or (tried := self._downhill(descent, amplitude, step)) is None:
                break
            loss = self.mean_short(self.ladder.longrope(tried, amplitude), _PIECES, _FACTORS)
            if loss is None:
                break
            descent.tell(tried, loss < best)
            best = min(best, loss)
        return None if descent.log_factors is start else descent.log_factors

    def _downhill(self, descent: Descent, amplitude: float, step: int) -> Tensor | None:
        """Return where the gradients of other pieces than those that decide point."""
        first = _PIECES + step * _GRADIENTS
        found = [self._gradient(descent, amplitude, first + n) for n in range(_GRADIENTS)]
        known = [each for each in found if each is not None]
        return descent.step(torch.stack(known)) if len(known) == _GRADIENTS else None

    def _gradient(self, descent: Descent, amplitude: float, piece: int) -> Tensor | None:
        at = descent.log_factors
        of = {"kind": "gradient", "log_factors": at.tolist(), "piece": piece}
        params = {"attention_factor": amplitude, "seq_len": self.ladder.trained}

        def measure() -> dict[str, Any]:
            value, found = gradient(self.model, at, params, lambda: self._short_loss(piece))
            return {"loss": value, "gradient": found.tolist()}

        self._begin(f"gradient {piece}")
        row = self.ledger.measured(of, _FACTORS, measure)
        return None if row is None else torch.tensor(row["gradient"], dtype=at.dtype)

    def full_length(
        self, likely: Sequence[Candidate], searched: Sequence[Candidate]
    ) -> list[Candidate]:
        """Return the finalists: plain, YaRN by its paper, and the best of each kind by one piece.

        Kinds are published frequencies, factors that were searched, and score methods.
        """
        scores, refusals = supported(self.model, score_methods(self.length, self.ladder.scaled))
        for refusal in refusals[:1]:  # as a rule the same for all
            self.display.line(f"score methods are left out: {refusal}")
        kinds = [likely[:_TRIED_WHOLE], searched, scores]
        # One of each kind after the other, so that each has had its likeliest when time is up.
        for rank in range(max(map(len, kinds))):
            for kind in kinds:
                for candidate in kind[rank : rank + 1]:
                    self._on_search_text(candidate)
        if best := self._best_at_full_length(scores):
            scaled = with_log_n(best, self.ladder.scaled)
            self._on_search_text(scaled)
            kinds[2] = [best, scaled]
        found = [self._best_at_full_length(kind) for kind in kinds]
        finalists = [Candidate(), self.yarn(), *(c for c in found if c is not None)]
        return [c for index, c in enumerate(finalists) if c not in finalists[:index]]

    def decide(self, finalists: Sequence[Candidate]) -> None:
        """Measure all finalists on held-out pieces, piece by piece, while there is time."""
        for piece in range(_HELD_OUT_PIECES):
            for candidate in finalists:
                if self._full(candidate, piece, "held-out", _HELD_OUT) is None:
                    return

    def on_held_out(self, candidate: Candidate) -> list[dict[str, Any]]:
        """Return what was measured of a finalist, in the order of pieces."""
        rows = self.ledger.results["rows"]
        of = [_of(candidate, "held-out", piece) for piece in range(_HELD_OUT_PIECES)]
        by_piece = [next((row for row in rows if row["of"] == each), None) for each in of]
        return [row for row in by_piece if row is not None]

    def mean_short(self, candidate: Candidate, pieces: int, share: float) -> float | None:
        """Return the mean loss on so many short pieces, None if there was no time for all."""
        found = []
        for piece in range(pieces):

            def measure(piece: int = piece) -> dict[str, Any]:
                with torch.inference_mode(), candidate.extending(self.model):
                    return {"loss": finite(self._short_loss(piece), candidate.name)}

            self._begin(candidate.name)
            of = _of(candidate, "short", piece)
            if (row := self.ledger.measured(of, share, measure)) is None:
                return None
            found.append(row["loss"])
        self._show("short", candidate, fmean(found), pieces)
        return fmean(found)

    def _short_loss(self, piece: int) -> Tensor:
        text, index = self._text(self.texts, piece)
        ids, at = short_piece(text, self.length, index, self.seed)
        return last_loss(
            self.model,
            ids.to(self.model.device),
            at.to(self.model.device),
            share=_LAST_OF_SHORT,
            on_layer=self.display.tick,
        )

    def _on_search_text(self, candidate: Candidate, share: float = _FULL_LENGTH) -> float | None:
        row = self._full(candidate, 0, "full", share)
        return None if row is None else row["loss"]

    def _full(
        self, candidate: Candidate, piece: int, kind: str, share: float
    ) -> dict[str, Any] | None:
        """Return the losses of a piece of full length: of its last part, the whole, its eighths."""
        text, index = self._text(self.held_out if kind == "held-out" else self.texts, piece)

        def measure() -> dict[str, Any]:
            ids = text.piece(self.length, index, self.seed).to(self.model.device)
            with candidate.extending(self.model):
                losses = token_losses(self.model, ids[None], self.display.tick)[0].double()
            start = int(self.length * (1 - _LAST))
            return {
                "loss": finite(losses[start:].mean(), candidate.name),
                "whole": losses.mean().item(),
                "eighths": [part.mean().item() for part in losses.tensor_split(8)],
            }

        self._begin(candidate.name)
        row = self.ledger.measured(_of(candidate, kind, piece), share, measure)
        if row is not None:
            self._show(kind, candidate, row["loss"], piece + 1)
        return row

    def _best_at_full_length(self, candidates: Sequence[Candidate]) -> Candidate | None:
        found = {}
        for row in self.ledger.results["rows"]:
            for index, candidate in enumerate(candidates):
                if row["of"] == _of(candidate, "full", 0):
                    found[index] = row["loss"]
        return candidates[min(found, key=found.__getitem__)] if found else None

    def _text(self, texts: Sequence[Text], piece: int) -> tuple[Text, int]:
        return texts[piece % len(texts)], piece // len(texts)

    def _begin(self, name: str) -> None:
        self.display.begin(name, len(decoder_layers(self.model)))

    def _show(self, kind: str, candidate: Candidate, loss: float, piece: int) -> None:
        """Show a loss, and the best of its kind so far."""
        key = f"{kind} {piece}"
        if key != self._best[1] or loss < self._best[0]:
            self._best = loss, key
        best = "  best so far" if loss == self._best[0] else ""
        self.display.line(f"{kind:<8} {loss:.4f}  {candidate.name}{best}")


def _of(candidate: Candidate, kind: str, piece: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "method": candidate.method,
        "params": candidate.params,
        "piece": piece,
    }
