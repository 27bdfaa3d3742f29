"""One pass of a causal model over long sequences, in little memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .models import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Elements of logits that are computed at a time: 128 MiB in float32.
_LOGITS_AT_ONCE = 2**25


def run_body(
    model: PreTrainedModel,
    ids: Tensor,
    on_layer: Callable[[], None] = lambda: None,
    positions: Tensor | None = None,
) -> Any:
    """Run the model without its head over whole sequences and return the body's output.

    ids: (batch, seqlen) int64
    on_layer: called after each decoder layer.
    positions: (seqlen,) int64, rising; 0, 1, 2, ... if None.
    """
    options = {}
    if positions is not None:
        # Without a mask, a gap in positions means packed sequences to transformers.
        options = {"position_ids": positions[None], "attention_mask": torch.ones_like(ids)}
    with _after_each_layer(model, on_layer):
        return model.base_model(input_ids=ids, use_cache=False, return_dict=True, **options)


def logits(model: PreTrainedModel, body: Any, start: int, stop: int) -> Tensor:
    """Return the logits at positions start .. stop - 1: (batch, stop - start, vocab) float32.

    The model's own forward computes them, with the output of `run_body` in place of its body. So
    a model's soft-capping or scaling of logits applies.
    """
    hidden = body.last_hidden_state[:, start:stop]
    part = dataclasses.replace(body, last_hidden_state=hidden)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with forward_replaced(model.base_model, lambda *args, **kwargs: part):
        return model(input_ids=ids, use_cache=False).logits.float()


def chunks(start: int, stop: int, vocab_size: int, batch: int = 1) -> Iterator[tuple[int, int]]:
    """Cut start .. stop - 1 into ranges whose logits fit in memory."""
    step = max(1, _LOGITS_AT_ONCE // (vocab_size * batch))
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while; an earlier replacement comes back after it."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _after_each_layer(model: PreTrainedModel, on_layer: Callable[[], None]) -> Iterator[None]:
    handles = [
        layer.register_forward_hook(lambda *_: on_layer()) for layer in decoder_layers(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
