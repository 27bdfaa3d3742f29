"""The next-token loss of a text, by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extrope_kernels.evaluation.forward import chunks, logits, run_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def token_losses(
    model: PreTrainedModel, ids: Tensor, on_progress: Callable[[], None] = lambda: None
) -> Tensor:
    """Return the loss, in nats, of the prediction made at each position but the last.

    ids: (seqlen,) int64
    on_progress: called after each decoder layer, and once after the head.

    Returns: (seqlen - 1,) float32 on the CPU; entry t is -log p(ids[t + 1] | ids[: t + 1]).
    """
    body = run_body(model, ids, on_progress)
    vocab_size = model.config.get_text_config().vocab_size
    parts = [
        torch.nn.functional.cross_entropy(
            logits(model, body, start, stop), ids[start + 1 : stop + 1], reduction="none"
        )
        for start, stop in chunks(0, len(ids) - 1, vocab_size)
    ]
    on_progress()
    return torch.cat(parts).cpu()


def bucket_edges(length: int, bucket: int) -> list[tuple[int, int]]:
    """Cut positions 0 .. length - 1 into buckets, the last one as long as what is left."""
    return [(start, min(start + bucket, length)) for start in range(0, length, bucket)]


def bucket_means(losses: Tensor, bucket: int) -> list[dict[str, Any]]:
    """Return the mean loss of each bucket of positions.

    losses: (seqlen - 1,) of `token_losses`. The last position of the text predicts nothing known,
        so the last bucket averages one prediction less than it has positions, and a bucket of
        that position alone is left out.
    """
    means = []
    for start, stop in bucket_edges(len(losses) + 1, bucket):
        part = losses[start:stop].double()
        if len(part):
            means.append(
                {"start": start, "stop": stop, "tokens": len(part), "loss": part.mean().item()}
            )
    return means
