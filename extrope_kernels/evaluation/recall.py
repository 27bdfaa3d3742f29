"""Recall: how much less a repeated passage costs, by the distance to its first copy.

A model that uses far tokens predicts a passage better the second time. This shows even in small
models, which cannot answer questions yet. Both copies come from elsewhere in the text, so nothing
else tells how they go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import UsageError, loss, plots, texts
from .report import mean_and_error, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST_PASSAGE = 64
_AT_EACH = 3  # passages per distance in one text
_PARTS = (1, 2, 4, 8, 15)  # distances, in sixteenths of the longest text


class Repeat(NamedTuple):
    """A passage that a text holds twice: its distance, both starts, and its number of tokens."""

    distance: int
    first: int
    again: int
    tokens: int


def distances(longest: int) -> tuple[list[int], int]:
    """Return the distances to measure in texts of up to `longest` tokens, and a passage's length.

    All second copies stand one after another at the end, so they fit into the shortest distance.

    Raises UsageError when there is no room.
    """
    count = _AT_EACH * len(_PARTS)
    passage = min(_LONGEST_PASSAGE, longest // 16 // count)
    if passage < 2:
        raise UsageError(f"--lengths {longest}: recall needs {2 * 16 * count} tokens")
    return [part * (longest // 16) for part in _PARTS], passage


def repeats(length: int, wanted: Sequence[int], passage: int) -> list[Repeat]:
    """Return the passages that come again at the end of a text of `length` tokens.

    wanted: distances, rising. Each one that fits gets several passages.
    """
    fitting = [distance for distance in wanted if distance + _AT_EACH * passage < length]
    each = [distance for distance in fitting for _ in range(_AT_EACH)]
    starts = range(length - passage * len(each), length, passage)
    return [Repeat(d, again - d, again, passage) for d, again in zip(each, starts, strict=True)]


def repeated(ids: Tensor, others: Tensor, found: Sequence[Repeat]) -> Tensor:
    """Return the text with passages of other tokens in both places of each repeat.

    others: (passages * tokens,)
    """
    ids = ids.clone()
    for repeat, passage in zip(found, others.split(found[0].tokens), strict=True):
        for start in (repeat.first, repeat.again):
            ids[start : start + repeat.tokens] = passage
    return ids


def gains(losses: Tensor, found: Sequence[Repeat]) -> list[float]:
    """Return how much less each passage costs the second time, in nats a token.

    The first quarter of a passage does not count: it tells the model that there is something to
    recall.

    losses: (seqlen - 1,), a row of `loss.token_losses`.
    """
    costs = []
    for repeat in found:
        skipped = repeat.tokens // 4
        first, again = (
            losses[start + skipped - 1 : start + repeat.tokens - 1].double().mean().item()
            for start in (repeat.first, repeat.again)
        )
        costs.append(first - again)
    return costs


class RecallTask:
    """A task: the gain in loss of passages that were read before, by distance."""

    name = "recall"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, asked: texts.Asked) -> None:
        longest = max(asked.lengths)
        self._distances, self._passage = distances(longest)
        for length in asked.lengths:
            if not repeats(length, self._distances, self._passage):
                raise UsageError(f"--lengths {length}: too short for --lengths {longest}")
        more = self._passage * _AT_EACH * len(_PARTS)
        self.reading = texts.Reading(tokenizer, asked, longest + more)

    def settings(self) -> dict[str, Any]:
        return {"distances": self._distances, "passage": self._passage}

    def heads(self) -> list[str]:
        return [f"{distance:,}" for distance in self._distances]

    def ticks(self, layers: int) -> int:
        return (layers + 1) * self.reading.count

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        found = repeats(length, self._distances, self._passage)
        by_distance: dict[int, list[float]] = {repeat.distance: [] for repeat in found}
        for piece in self.reading.pieces(length, self._passage * len(found)):
            ids = repeated(piece[:length], piece[length:], found)
            losses = loss.token_losses(model, ids[None].to(model.device), on_progress)[0]
            for repeat, gain in zip(found, gains(losses, found), strict=True):
                by_distance[repeat.distance].append(gain)
        return {
            "tokens": length * self.reading.count,
            "gains": [
                {"distance": distance, "gain": mean, "error": error, "passages": costs}
                for distance, costs in by_distance.items()
                for mean, error in [mean_and_error(costs)]
            ],
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        return [with_error(gain["gain"], gain["error"], 2) for gain in row["gains"]]

    def plot(self, results: dict[str, Any], path: Path) -> None:
        plots.plot_recall(results, path)
