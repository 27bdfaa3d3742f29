"""A task: how much less a repeated passage costs, by the distance to its first copy.

A model that uses far tokens predicts a passage better the second time. This shows even in small
models, which cannot answer questions yet. Both copies come from elsewhere in the text, so nothing
else tells how they go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .._usage import UsageError
from . import loss
from .report import mean_and_error, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        raise UsageError(f"lengths {longest}: recall needs {2 * 16 * count} tokens")
    return [part * (longest // 16) for part in _PARTS], passage


def repeats(length: int, wanted: Sequence[int], passage: int) -> list[Repeat]:
    """Return the passages that come again at the end of a text of `length` tokens.

    wanted: distances, rising. Each one that fits gets several passages.
    """
    fitting = [distance for distance in wanted if distance + _AT_EACH * passage < length]
    each = [distance for distance in fitting for _ in range(_AT_EACH)]
    starts = range(length - passage * len(each), length, passage)
    return [Repeat(d, again - d, again, passage) for d, again in zip(each, starts, strict=True)]


def repeated(ids: Tensor, length: int, found: Sequence[Repeat]) -> Tensor:
    """Return a text with passages of other tokens in both places of each repeat.

    ids: (length + passages * tokens or more,), the text and then the passages.

    Returns: (length,)
    """
    text = ids[:length].clone()
    for number, repeat in enumerate(found):
        passage = ids[length + number * repeat.tokens :][: repeat.tokens]
        for start in (repeat.first, repeat.again):
            text[start : start + repeat.tokens] = passage
    return text


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
    """The gain in loss of passages that were read before, by distance; as `loss.LossTask`."""

    def __init__(self, lengths: Sequence[int], bucket: int) -> None:
        longest = max(lengths)
        wanted, passage = distances(longest)
        for length in lengths:
            if not repeats(length, wanted, passage):
                raise UsageError(f"lengths {length}: too short for lengths {longest}")
        self.more = passage * _AT_EACH * len(_PARTS)
        self.settings: dict[str, Any] = {"distances": wanted, "passage": passage}
        self.heads = [f"{distance:,}" for distance in wanted]

    def read(self, model: PreTrainedModel, piece: Tensor) -> Tensor:
        """Return the losses of a piece, for the model in its present state: (seqlen - 1,)."""
        length = len(piece) - self.more
        found = repeats(length, *self.settings.values())
        return loss.token_losses(model, repeated(piece, length, found)[None])[0]

    def row(self, read: Sequence[Tensor]) -> dict[str, Any]:
        """Return the numbers of a row, from what `read` returned of each piece."""
        length = len(read[0]) + 1
        found = repeats(length, *self.settings.values())
        by_distance: dict[int, list[float]] = {repeat.distance: [] for repeat in found}
        for losses in read:
            for repeat, gain in zip(found, gains(losses, found), strict=True):
                by_distance[repeat.distance].append(gain)
        means = [(*mean_and_error(costs), costs) for costs in by_distance.values()]
        return {
            "tokens": length * len(read),
            "gains": [
                {"distance": distance, "gain": mean, "error": error, "passages": costs}
                for distance, (mean, error, costs) in zip(by_distance, means, strict=True)
            ],
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each column that the row reaches."""
        return [with_error(gain["gain"], gain["error"], 2) for gain in row["gains"]]
