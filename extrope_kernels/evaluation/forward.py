"""The losses of a causal model's predictions over long texts, in little memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .models import decoder_layers

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


@contextmanager
def after_each_layer(model: PreTrainedModel, call: Callable[[], None]) -> Iterator[None]:
    """Call a function after each forward of a decoder layer, in a `with` block."""
    handles = [layer.register_forward_hook(lambda *_: call()) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
