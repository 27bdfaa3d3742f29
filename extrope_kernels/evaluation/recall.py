"""Recall: what a passage costs that the text has had before, by how far back that was.

A model that uses far tokens predicts a passage better the second time. Even a small one shows in
this whether it does, long before it answers questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from extrope_kernels.evaluation import UsageError, loss, plots, texts
from extrope_kernels.evaluation.spread import mean_and_error, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST_PASSAGE = 64
_PARTS = (1, 2, 4, 8, 15)  # distances, in sixteenths of the longest text


class Repeat(NamedTuple):
    """A passage that a text holds twice: positions of its first tokens, and its tokens."""

    distance: int
    first: int
    again: int
    tokens: int


def distances(longest: int) -> tuple[list[int], int]:
    """Return the distances to ask for in texts of so many tokens, and the tokens of a passage.

    All passages come again one after another at the end, so they fit into the shortest distance.

    Raises UsageError when there is no room.
    """
    passage = min(_LONGEST_PASSAGE, longest // 16 // len(_PARTS))
    if passage < 2:
        raise UsageError(f"--lengths {longest}: recall needs {2 * 16 * len(_PARTS)} tokens")
    return [part * (longest // 16) for part in _PARTS], passage


def repeats(length: int, wanted: Sequence[int], passage: int) -> list[Repeat]:
    """Return the passages that come again at the end of a text of so many tokens.

    Of the distances `wanted`, rising, those that fit.
    """
    fitting = [distance for distance in wanted if distance + passage < length]
    end = length - passage * len(fitting)
    starts = range(end, length, passage)
    return [Repeat(d, again - d, again, passage) for d, again in zip(fitting, starts, strict=True)]


def repeated(ids: Tensor, found: Sequence[Repeat]) -> Tensor:
    """Return the text with its last tokens replaced by passages that it has had before."""
    ids = ids.clone()
    for repeat in found:
        passage = ids[repeat.first : repeat.first + repeat.tokens]
        ids[repeat.again : repeat.again + repeat.tokens] = passage
    return ids


def gains(losses: Tensor, found: Sequence[Repeat]) -> list[float]:
    """Return by how many nats a token each passage costs less than when first seen.

    losses: (seqlen - 1,) of `loss.token_losses`. The first quarter of a passage, by which a model
        finds out that there is something to recall, does not count.
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
    """What a passage gains in loss by having been read before, by distance."""

    name = "recall"

    def __init__(
        self,
        args: argparse.Namespace,
        lengths: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._distances, self._passage = distances(max(lengths))
        for length in lengths:
            if not repeats(length, self._distances, self._passage):
                raise UsageError(f"--lengths {length}: too short for --lengths {max(lengths)}")
        self._texts = texts.load_texts(tokenizer, args.text, max(lengths))
        self._trials, self._seed = args.trials, args.seed

    def settings(self) -> dict[str, Any]:
        return {
            "distances": self._distances,
            "passage": self._passage,
            "texts": [text.about() for text in self._texts],
            "trials": self._trials,
            "seed": self._seed,
        }

    def heads(self) -> list[str]:
        return [f"{distance:,}" for distance in self._distances]

    def ticks(self, layers: int) -> int:
        return (layers + 1) * self._trials * len(self._texts)

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        found = repeats(length, self._distances, self._passage)
        by_piece = []
        for piece in texts.pieces(self._texts, length, self._trials, self._seed):
            ids = repeated(piece, found).to(model.device)
            by_piece.append(gains(loss.token_losses(model, ids, on_progress), found))
        columns = [list(column) for column in zip(*by_piece, strict=True)]
        return {
            "tokens": length * len(by_piece),
            "gains": [
                dict(zip(("gain", "error"), mean_and_error(column))) | {"distance": repeat.distance}
                for repeat, column in zip(found, columns, strict=True)
            ],
            "pieces": by_piece,
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        return [with_error(gain["gain"], gain["error"], 2) for gain in row["gains"]]

    def plot(self, results: dict[str, Any], path: Path) -> None:
        plots.plot_recall(results, path)
