"""The loss of the last part of a text, and its gradient, in memory that stays small."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...integrations.transformers import extend
from .. import UsageError
from ..forward import chunks, forward_replaced, logits, run_body
from ..models import decoder_layers
from ..texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a short piece: enough for a model to use what it has read, few enough for many pieces.
_SHORT = 1024
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, without their whole parts, are spread evenly


class NoGradient(Exception):
    """The loss of this model says nothing of how it depends on the frequencies."""


def short_piece(text: Text, length: int, index: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return few tokens whose positions reach far: ids and positions, (tokens,) int64.

    They have a gap between two of them, as PoSE trains with (https://arxiv.org/abs/2309.10400), in
    the first half. So what comes in the second half has to be read at far distances, for a
    hundredth of what the whole length costs. Gaps take half to all of the length: what a model
    bears at a few thousand positions more tells nothing of what it does at the end.
    """
    tokens = min(_SHORT, length)
    drawn = random.Random(f"{seed} {index}")
    cut = drawn.randrange(tokens // 4, tokens // 2)
    share = 0.5 + 0.5 * (index * _GOLDEN % 1)
    at = torch.arange(tokens)
    at[cut:] += round(share * (length - tokens))
    return text.piece(tokens, index, seed), at


def last_loss(
    model: PreTrainedModel,
    ids: Tensor,
    at: Tensor | None = None,
    *,
    share: float,
    on_layer: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the mean loss, in nats, of the last `share` of a text's predictions: a scalar.

    ids, at: (seqlen,) int64, tokens and positions; 0, 1, 2, ... if None.
    on_layer: called after each decoder layer.

    Gradients, where they are recorded, find the logits of one chunk at a time computed again.
    """
    body = run_body(model, ids[None], on_layer, at)
    start, stop = int(len(ids) * (1 - share)), len(ids) - 1
    vocab_size = model.config.get_text_config().vocab_size

    def total(begin: int, end: int) -> Tensor:
        predicted = logits(model, body, begin, end)[0]
        return torch.nn.functional.cross_entropy(
            predicted, ids[begin + 1 : end + 1], reduction="sum"
        )

    parts = [
        checkpoint(total, begin, end, use_reentrant=False)
        for begin, end in chunks(start, stop, vocab_size)
    ]
    return torch.stack(parts).sum() / (stop - start)


def finite(loss: Tensor, name: str) -> float:
    """Return a loss as a number; raises UsageError, naming what it was measured under, if none."""
    if not loss.isfinite():
        raise UsageError(f"the loss under {name} is {loss.item()}, which ranks with no other")
    return loss.item()


def gradient(
    model: PreTrainedModel, log_factors: Tensor, params: dict[str, Any], loss: Callable[[], Tensor]
) -> tuple[float, Tensor]:
    """Return the loss under LongRoPE's factors, and its gradient to their logarithms.

    log_factors: (pairs,)
    params: the rest that `longrope` is given.
    loss: of the model as it is when called.

    Raises NoGradient where none reaches them: a model's own rotary embedding may record none.
    """
    logs = log_factors.detach().clone().requires_grad_()
    factors = logs.exp()
    with (
        extend(model, "longrope", short_factor=factors, long_factor=factors, **params),
        _checkpointed(model),
    ):
        value = loss()
        if not value.requires_grad:
            raise NoGradient
        (found,) = torch.autograd.grad(value, logs)
    return value.item(), found


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Keep only what goes from layer to layer until the backward, which computes the rest again."""
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(forward_replaced(layer, _recomputed(layer.forward)))
        yield


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
