"""PoSE: two pieces of a document with a gap of positions between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_count, check_counts, check_device, check_generator
from ._draws import copy_to, draw_below

_NAME = "positions.pose"


def pose(
    batch: int,
    num_tokens: int | Sequence[int] | Tensor,
    train_length: int,
    target_length: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
) -> tuple[Tensor, Tensor]:
    """PoSE: two pieces of a longer document, with a skip of positions between them.

    The first piece: tokens 0, ..., n1 - 1 at these positions,  n1 ~ U{1, ..., (n + 1) // 2}
    The second: the n - n1 tokens before e, at n1 + u, n1 + u + 1, ...,
        e ~ U{n, ..., num_tokens},  u ~ U{0, ..., target_length - n}
    with n = min(num_tokens, train_length)

    The distances between the pieces change, so this acts on a purely relative rotation too: it
    meets distances up to target_length - 1 at the cost of train_length. Train and infer with the
    same frequencies: `pi`, `ntk_aware` or `yarn` with factor target_length / train_length. At
    inference use plain positions. The authors cut documents to 5 * train_length tokens before.

    batch: documents.
    num_tokens: tokens in a document; an int, or one per document, (batch,), read on the host.
        Documents shorter than train_length must all be of one length.
    train_length: tokens to train on.
    target_length: positions to reach, >= train_length.
    generator: for n1, e and u, on the CPU.
    device: of the results; None is the CPU.

    Returns: positions and token_indices, both (batch, n) int64 and rising; the inputs are
        `ids.gather(1, token_indices)` for ids (batch, num_tokens).
    Raises: ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2309.10400
    """
    batch = check_count(_NAME, "batch", batch)
    documents = check_counts(_NAME, "num_tokens", num_tokens, batch)
    train_length = check_count(_NAME, "train_length", train_length)
    target_length = check_count(_NAME, "target_length", target_length)
    if target_length < train_length:
        raise ValueError(
            f"{_NAME}: target_length must be >= train_length ({train_length}), got {target_length}"
        )
    lengths = documents.clamp(max=train_length).unique().tolist()
    if len(lengths) > 1:
        raise ValueError(
            f"{_NAME}: num_tokens must be >= train_length ({train_length}) or the same in "
            f"all documents, got {documents.flatten().tolist()}"
        )
    generator = check_generator(_NAME, generator)
    device = check_device(_NAME, device)
    (n,) = lengths
    limits = torch.cat(
        (
            torch.full_like(documents, (n + 1) // 2),
            documents - n + 1,
            torch.full_like(documents, target_length - n + 1),
        ),
        dim=-1,
    )
    first, end, skip = draw_below(limits, generator).split(1, dim=-1)
    positions, token_indices = take_pieces(n, 1 + first, n + end, skip)
    return copy_to(positions, device), copy_to(token_indices, device)


def take_pieces(n: int, first: Tensor, end: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and token_indices, (batch, n), for given n1, e and u, each (batch, 1)."""
    index = torch.arange(n, device=first.device)
    in_second = index >= first
    positions = torch.where(in_second, index + skip, index)
    token_indices = torch.where(in_second, index + end - n, index)
    return positions, token_indices
