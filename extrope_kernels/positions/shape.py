"""SHAPE: every training sequence starts at a position of its own."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .._checks import check_bool, check_count, check_device, check_generator
from ._draws import copy_to

_NAME = "positions.shape"


def shape(
    batch: int,
    seqlen: int,
    max_shift: int,
    *,
    max_len: int | None = None,
    training: bool = True,
    eval_shift: str | int = "zero",
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """SHAPE: 0, 1, 2, ... plus one random shift per sequence.

    positions[b, t] = t + k_b,  k_b ~ U{0, ..., min(max_shift, max_len - seqlen) - 1}

    The shift is the same for query and key and cancels: under a rotation only rounding changes. It
    matters for absolute encodings, and for parts of a model that depend on the absolute position
    (log-n scaling of queries, the groups of SelfExtend and dual chunk attention). Draw for an
    encoder and a decoder separately.

    batch, seqlen: sequences, and tokens in each.
    max_shift: K, >= 0. K itself is never drawn, as in the authors' code; with 0 nothing is shifted.
    max_len: positions that the model has, >= seqlen + eval_shift; None for no limit.
    training: False for the shift `eval_shift` in every sequence.
    eval_shift: "zero"; "K" for max_shift, as in the authors' code; or an int >= 0.
    generator: for the shifts, on the CPU.
    device: of the result; None is the CPU.

    Returns: (batch, seqlen) int64.
    Raises: ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2109.05644
    """
    batch = check_count(_NAME, "batch", batch)
    seqlen = check_count(_NAME, "seqlen", seqlen)
    max_shift = check_count(_NAME, "max_shift", max_shift, at_least=0)
    fixed = _eval_shift(eval_shift, max_shift)
    room = None if max_len is None else check_count(_NAME, "max_len", max_len) - seqlen
    if room is not None and room < fixed:
        raise ValueError(
            f"{_NAME}: max_len must be >= seqlen + eval_shift ({seqlen} + {fixed}), got {max_len}"
        )
    generator = check_generator(_NAME, generator)
    device = check_device(_NAME, device)
    if check_bool(_NAME, "training", training):
        limit = max_shift if room is None else min(max_shift, room)
        # The authors' own call, so that a seed gives their shifts.
        shifts = torch.randint(0, max(limit, 1), (batch,), generator=generator, device="cpu")
    else:
        shifts = torch.full((batch,), fixed, dtype=torch.int64, device="cpu")
    positions = torch.arange(seqlen, dtype=torch.int64, device="cpu") + shifts.unsqueeze(-1)
    return copy_to(positions, device)


def _eval_shift(eval_shift: str | int, max_shift: int) -> int:
    named = {"zero": 0, "K": max_shift}
    if isinstance(eval_shift, str) and eval_shift in named:
        return named[eval_shift]
    if isinstance(eval_shift, Integral) and not isinstance(eval_shift, bool):
        return check_count(_NAME, "eval_shift", eval_shift, at_least=0)
    kind = ValueError if isinstance(eval_shift, str) else TypeError
    raise kind(f'{_NAME}: eval_shift must be "zero", "K" or an int, got {eval_shift!r}')
