"""A task: the next-token loss of texts, by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import forward
from .report import mean_and_error, with_error
from .texts import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LossTask:
    """The mean next-token loss of pieces of some lengths, by bucket of positions.

    tokens: what a text must have. settings: what the numbers depend on. heads: of the table.
    """

    def __init__(self, lengths: Sequence[int], bucket: int) -> None:
        self.tokens = max(lengths)
        self.settings: dict[str, Any] = {"bucket": bucket}
        self.heads = [_range_label(*edges) for edges in bucket_edges(self.tokens, bucket)]

    def measure(self, model: PreTrainedModel, reading: Reading, length: int) -> dict[str, Any]:
        """Return the numbers of a row, for the model in its present state."""
        pieces = reading.pieces(length)
        losses = torch.cat([forward.token_losses(model, ids[None]) for ids in pieces])
        return {
            "tokens": length * reading.count,
            **_over_pieces(losses),
            "buckets": bucket_means(losses, self.settings["bucket"]),
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each column that the row reaches."""
        return [with_error(bucket["loss"], bucket["error"], 3) for bucket in row["buckets"]]


def bucket_means(losses: Tensor, bucket: int) -> list[dict[str, Any]]:
    """Return the mean loss of each bucket of positions, and its standard error over pieces.

    The last position of a text has no prediction to check. So the last bucket averages one
    prediction less than it has positions, and a bucket of that position alone is left out.

    losses: (pieces, seqlen - 1), rows of `forward.token_losses`.
    """
    edges = bucket_edges(losses.shape[1] + 1, bucket)
    parts = [(start, stop, losses[:, start:stop]) for start, stop in edges]
    return [
        {"start": start, "stop": stop, "tokens": part.shape[1], **_over_pieces(part)}
        for start, stop, part in parts
        if part.shape[1]
    ]


def bucket_edges(length: int, bucket: int) -> list[tuple[int, int]]:
    """Cut positions 0 .. length - 1 into buckets; the last may be shorter."""
    return [(start, min(start + bucket, length)) for start in range(0, length, bucket)]


def _over_pieces(losses: Tensor) -> dict[str, Any]:
    by_piece = losses.double().mean(1).tolist()
    mean, error = mean_and_error(by_piece)
    return {"loss": mean, "error": error, "pieces": by_piece}


def _range_label(start: int, stop: int) -> str:
    """Return a range of positions for a column head: 2-4k, or 512-768."""
    if start % 1024 == 0 and stop % 1024 == 0:
        return f"{start // 1024}-{stop // 1024}k"
    return f"{start}-{stop}"
