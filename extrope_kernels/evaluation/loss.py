"""The next-token loss of a text, by position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import plots, texts
from .forward import chunks, logits, run_body
from .report import mean_and_error, range_label, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def token_losses(
    model: PreTrainedModel, ids: Tensor, on_progress: Callable[[], None] = lambda: None
) -> Tensor:
    """Return the loss, in nats, of the prediction at each position but the last.

    ids: (batch, seqlen) int64
    on_progress: called after each decoder layer, and once after the head.

    Returns: (batch, seqlen - 1) float32 on the CPU; [:, t] is -log p(ids[t + 1] | ids[: t + 1]).
    """
    rows, seqlen = ids.shape
    body = run_body(model, ids, on_progress)
    vocab_size = model.config.get_text_config().vocab_size
    # Tokens as rows: over any dim but the last, PyTorch sums the vocabulary one by one, and loses
    # terms far below the sum so far.
    parts = [
        torch.nn.functional.cross_entropy(
            logits(model, body, start, stop).flatten(0, 1),
            ids[:, start + 1 : stop + 1].flatten(),
            reduction="none",
        ).unflatten(0, (rows, stop - start))
        for start, stop in chunks(0, seqlen - 1, vocab_size, rows)
    ]
    on_progress()
    return torch.cat(parts, 1).cpu()


def bucket_edges(length: int, bucket: int) -> list[tuple[int, int]]:
    """Cut positions 0 .. length - 1 into buckets; the last may be shorter."""
    return [(start, min(start + bucket, length)) for start in range(0, length, bucket)]


def bucket_means(losses: Tensor, bucket: int) -> list[dict[str, Any]]:
    """Return the mean loss of each bucket of positions, and its standard error over pieces.

    The last position of a text has no prediction to check. So the last bucket averages one
    prediction less than it has positions, and a bucket of that position alone is left out.

    losses: (pieces, seqlen - 1), rows of `token_losses`.
    """
    means = []
    for start, stop in bucket_edges(losses.shape[1] + 1, bucket):
        part = losses[:, start:stop].double()
        if part.shape[1]:
            by_piece = part.mean(1).tolist()
            mean, error = mean_and_error(by_piece)
            means.append(
                {
                    "start": start,
                    "stop": stop,
                    "tokens": part.shape[1],
                    "loss": mean,
                    "error": error,
                    "pieces": by_piece,
                }
            )
    return means


class LossTask:
    """A task: the mean next-token loss of pieces of `length` tokens, by bucket of positions."""

    name = "loss"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, asked: texts.Asked) -> None:
        self._longest, self._bucket = max(asked.lengths), asked.bucket
        self.reading = texts.Reading(tokenizer, asked, self._longest)

    def settings(self) -> dict[str, Any]:
        return {"bucket": self._bucket}

    def heads(self) -> list[str]:
        edges = bucket_edges(self._longest, self._bucket)
        return [range_label(start, stop) for start, stop in edges]

    def ticks(self, layers: int) -> int:
        return (layers + 1) * self.reading.count

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        pieces = self.reading.pieces(length)
        losses = torch.cat(
            [token_losses(model, ids[None].to(model.device), on_progress) for ids in pieces]
        )
        by_piece = losses.double().mean(1).tolist()
        mean, error = mean_and_error(by_piece)
        return {
            "tokens": length * len(by_piece),
            "loss": mean,
            "error": error,
            "buckets": bucket_means(losses, self._bucket),
            "pieces": by_piece,
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        return [with_error(bucket["loss"], bucket["error"], 3) for bucket in row["buckets"]]

    def plot(self, results: dict[str, Any], path: Path) -> None:
        plots.plot_loss(results, path)
