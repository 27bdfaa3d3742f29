"""Random Padding: part of the padding goes in front of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_bool, check_count, check_counts, check_device, check_generator
from ._draws import copy_to, draw_below

_NAME = "positions.random_padding"


def random_padding(
    batch: int,
    num_tokens: int | Sequence[int] | Tensor,
    length: int,
    *,
    num_fixed_prefix: int = 0,
    training: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Random padding: a random part of the padding goes in front of the tokens.

    positions[b, t] = t + f_b for token t of n_b,  f_b ~ U{0, ..., length - n_b}

    A row of the batch, padded at the end, is rolled: its tokens move f_b places up and the padding
    that falls off the end comes to the front. Either roll the batch and let places be positions,

        padded = torch.empty_like(ids).scatter_(1, positions, ids)  # ids: (batch, length)

    or keep the batch and its mask, and give `positions` to `apply_rope`.

    All tokens of a sequence move together: under a rotation only rounding changes, if the padding
    is masked. It matters for absolute encodings, and for parts of a model that depend on the
    absolute position (see `shape`). With `num_fixed_prefix` the distances to the prefix do grow.
    A uniform f is our reading: the paper has no public code.

    batch: sequences.
    num_tokens: n, 1 to length; an int, or one per sequence, (batch,), read on the host.
    length: places in a row, tokens and padding.
    num_fixed_prefix: number of first tokens that stay in front, 0 to n ([CLS], a question).
    training: False for all padding at the end, as at inference.
    generator: for f, on the CPU.
    device: of the results; None is the CPU.

    Returns: positions, (batch, length) int64, in each row a permutation, the tokens' first, the
        padding's after them; mask, (batch, length) bool by place, True where a token is.
    Raises: ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2305.04859
    """
    batch = check_count(_NAME, "batch", batch)
    tokens = check_counts(_NAME, "num_tokens", num_tokens, batch)
    length = check_count(_NAME, "length", length)
    prefix = check_count(_NAME, "num_fixed_prefix", num_fixed_prefix, at_least=0)
    if (most := tokens.max().item()) > length:
        raise ValueError(f"{_NAME}: num_tokens must be <= length ({length}), got {most}")
    if prefix > (fewest := tokens.min().item()):
        raise ValueError(
            f"{_NAME}: num_fixed_prefix must be <= num_tokens ({fewest}), got {prefix}"
        )
    generator = check_generator(_NAME, generator)
    device = check_device(_NAME, device)
    if check_bool(_NAME, "training", training):
        front = draw_below(length - tokens + 1, generator)
    else:
        front = torch.zeros_like(tokens)
    positions, mask = place(front, tokens, length, prefix)
    return copy_to(positions, device), copy_to(mask, device)


def place(front: Tensor, tokens: Tensor, length: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Return positions and mask for given padding in front; front and tokens: (batch, 1)."""
    columns = torch.arange(length, device=front.device)
    moving = max(length - prefix, 1)
    rotated = prefix + (columns - prefix + front) % moving
    positions = torch.where(columns < prefix, columns, rotated)
    moved = (columns >= prefix + front) & (columns < tokens + front)
    return positions, moved | (columns < prefix)
