"""The next-token loss of texts, in little memory, and by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .report import mean_and_error, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Elements of logits that are computed at a time: 128 MiB in float32.
_LOGITS_AT_ONCE = 2**25


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the loss, in nats, of the prediction at each position but the last.

    ids: (batch, seqlen) int64

    Returns: (batch, seqlen - 1) float32 on the CPU; [:, t] is -log p(ids[t + 1] | ids[: t + 1]).
    """
    rows, seqlen = ids.shape
    ids = ids.to(model.device)
    body = model.base_model(input_ids=ids, use_cache=False, return_dict=True)
    step = max(1, _LOGITS_AT_ONCE // (model.config.get_text_config().vocab_size * rows))
    parts = []
    for start in range(0, seqlen - 1, step):
        stop = min(start + step, seqlen - 1)
        # Tokens as rows: over any dim but the last, PyTorch sums the vocabulary one by one, and
        # loses terms far below the sum so far.
        losses = torch.nn.functional.cross_entropy(
            logits(model, body, start, stop).flatten(0, 1),
            ids[:, start + 1 : stop + 1].flatten(),
            reduction="none",
        )
        parts.append(losses.unflatten(0, (rows, stop - start)))
    return torch.cat(parts, 1).cpu()


def logits(model: PreTrainedModel, body: Any, start: int, stop: int) -> Tensor:
    """Return the logits at positions start .. stop - 1: (batch, stop - start, vocab) float32.

    The model's own forward computes them, with the body's output in place of its body. So a
    model's soft-capping or scaling of logits applies.
    """
    hidden = body.last_hidden_state[:, start:stop]
    part = dataclasses.replace(body, last_hidden_state=hidden)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    own = vars(model.base_model).get("forward")
    model.base_model.forward = lambda *args, **kwargs: part
    try:
        return model(input_ids=ids, use_cache=False).logits.float()
    finally:
        if own is None:
            del model.base_model.forward
        else:
            model.base_model.forward = own


class LossTask:
    """The mean next-token loss of pieces of text, by bucket of positions.

    more: tokens that a piece has after its text. settings: what the numbers depend on.
    heads: of the table.
    """

    more = 0

    def __init__(self, lengths: Sequence[int], bucket: int) -> None:
        self.settings: dict[str, Any] = {"bucket": bucket}
        edges = bucket_edges(max(lengths), bucket)
        self.heads = [f"{start}-{stop}" for start, stop in edges]

    def read(self, model: PreTrainedModel, piece: Tensor) -> Tensor:
        """Return the losses of a piece, for the model in its present state: (seqlen - 1,)."""
        return token_losses(model, piece[None])[0]

    def row(self, read: Sequence[Tensor]) -> dict[str, Any]:
        """Return the numbers of a row, from what `read` returned of each piece."""
        losses = torch.stack(list(read))
        return {
            "tokens": losses.numel() + len(losses),  # the first token of a piece has no loss
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

    losses: (pieces, seqlen - 1), rows of `token_losses`.
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
