"""Pieces of full length with repeated passages, and the weights of their tokens."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..loss import token_losses
from ..recall import Repeat, distances, gains, repeated, repeats
from ..texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Objectives of a search, and the key of each one's number in a row.
OBJECTIVES = {"loss": "loss", "recall": "again"}
NUMBERS = ("loss", "whole", "again", "recall")  # of a measurement
SHORTEST = 480  # tokens; recall's passages need as many
_LAST = 0.25  # the loss of this last share of a text's tokens counts


class Piece(NamedTuple):
    """Tokens of a text with passages that come twice: ids (seqlen,) int64."""

    ids: Tensor
    passages: list[Repeat]

    def weights(self, objective: str) -> Tensor:
        """Return the weight of each prediction: (seqlen - 1,) float64, with sum 1.

        "loss": the last quarter counts, without passages, which do not belong into the text.
        "recall": second copies of passages count, whose answers lie far back, as in LongRoPE2's
            search (https://arxiv.org/abs/2502.20082). The first quarter of a passage does not
            count: it tells that there is something to recall.
        """
        counts = torch.zeros(len(self.ids) - 1, dtype=torch.float64)
        if objective == "loss":
            counts[int(len(self.ids) * (1 - _LAST)) :] = 1
            for passage in self.passages:
                for start in (passage.first, passage.again):
                    counts[start - 1 : start + passage.tokens] = 0
        else:
            for passage in self.passages:
                start = passage.again + passage.tokens // 4
                counts[start - 1 : passage.again + passage.tokens - 1] = 1
        return counts / counts.sum()


def tokens_for(length: int) -> int:
    """Return the tokens of text that a piece takes: its own, and its passages after them."""
    return length + sum(passage.tokens for passage in repeats(length, *distances(length)))


def cut(text: Text, length: int, index: int, seed: int) -> Piece:
    """Return a piece of a text; its passages are the tokens after it."""
    found = repeats(length, *distances(length))
    ids = text.piece(length, index, seed, tokens_for(length) - length)
    return Piece(repeated(ids, length, found), found)


def measure(model: PreTrainedModel, piece: Piece) -> dict[str, Any]:
    """Return a piece's losses and the gain of its repeated passages, in nats a token."""
    losses = token_losses(model, piece.ids[None])[0].double()
    found = {name: losses @ piece.weights(objective) for objective, name in OBJECTIVES.items()}
    numbers = {name: value.item() for name, value in found.items()}
    recall = fmean(gains(losses, piece.passages))
    return {**numbers, "whole": losses.mean().item(), "recall": recall}
