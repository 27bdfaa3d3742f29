"""Randomized positional encodings: an ordered random choice from a longer range of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_count, check_device, check_generator
from ._draws import copy_to, draw_below

_NAME = "positions.randomized"


def randomized(
    seqlen: int,
    max_len: int,
    *,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Randomized positions: a sorted random choice of {0, ..., max_len - 1}.

    All such choices are equally likely. The distances between tokens change, so this acts on a
    purely relative rotation too: in training it meets distances up to max_len - 1. The authors draw
    anew at every layer, and at inference as well.

    Work and memory are those of drawing and sorting seqlen numbers, whatever max_len.

    seqlen: tokens in a sequence.
    max_len: the range of positions, >= seqlen.
    batch: None for one choice that all sequences share, as in the authors' code; else the number of
        sequences, each with a choice of its own.
    generator: for the choice, on the CPU.
    device: of the result; None is the CPU.

    Returns: (seqlen,) int64, or (batch, seqlen).
    Raises: ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2305.16843
    """
    seqlen = check_count(_NAME, "seqlen", seqlen)
    max_len = check_count(_NAME, "max_len", max_len)
    if max_len < seqlen:
        raise ValueError(f"{_NAME}: max_len must be >= seqlen ({seqlen}), got {max_len}")
    rows = () if batch is None else (check_count(_NAME, "batch", batch),)
    generator = check_generator(_NAME, generator)
    device = check_device(_NAME, device)
    last = torch.arange(max_len - seqlen, max_len, dtype=torch.int64, device="cpu")
    draws = draw_below((last + 1).expand(*rows, seqlen), generator)
    return copy_to(choose(draws, max_len), device)


def choose(draws: Tensor, max_len: int) -> Tensor:
    """Turn independent draws into a choice without repetition, sorted (Floyd's algorithm).

    draws: (..., n), the one at step s uniform in {0, ..., max_len - n + s}.

    Floyd takes the draws one by one. Step s adds its draw or, if that was added before, its own
    number max_len - n + s, which no earlier step can have added. All choices are then equally
    likely (Bentley and Floyd, CACM 30 (1987) 754). Here there is no loop over the steps. A draw was
    added before if an earlier step drew it, or if it is the number of an earlier step whose own
    draw was added before. Pointers to that step, doubled until they rest, lead to the step that
    decides.
    """
    n = draws.shape[-1]
    steps = torch.arange(n, device=draws.device).expand_as(draws)
    first = max_len - n
    ordered, order = draws.sort(dim=-1, stable=True)
    repeats = ordered[..., 1:] == ordered[..., :-1]
    repeated = torch.zeros_like(draws, dtype=torch.bool).scatter_(-1, order[..., 1:], repeats)
    decides = torch.where(repeated | (draws < first), steps, draws - first)
    while not torch.equal(further := decides.gather(-1, decides), decides):
        decides = further
    added_before = repeated.gather(-1, decides)
    return torch.where(added_before, first + steps, draws).sort(dim=-1).values
