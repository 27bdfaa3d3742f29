"""EXTROPE_CHECK=1: whether all ranks call alike, told before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Mesh, groups_of

VARIABLE = "EXTROPE_CHECK"
Prepared = TypeVar("Prepared")
Settings = dict[str, object]


def agreed(
    op: str, mesh: Mesh, prepare: Callable[[], Prepared], describe: Callable[[Prepared], Settings]
) -> Prepared:
    """prepare(), or its error. With EXTROPE_CHECK=1 all ranks raise where one does, or differs.

    describe: what has to be the same on all ranks.
    """
    if torch.compiler.is_compiling() or os.environ.get(VARIABLE, "") in ("", "0"):
        return prepare()
    prepared = error = None
    mine: Settings | str
    try:
        prepared = prepare()
        mine = describe(prepared)
    except Exception as refusal:  # of whatever kind: the others wait for this rank
        error, mine = refusal, str(refusal)
    told = _of_all_ranks(op, mesh, mine)
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if isinstance(text, str):
            raise ValueError(f"{op}: rank {rank} of the mesh was refused: {text}")
    settings = [one for one in told if isinstance(one, dict)]
    for name in settings[0]:
        values = [one[name] for one in settings]
        if any(value != values[0] for value in values):
            raise ValueError(f"{op}: {name} must be alike on all ranks of the mesh, got {values}")
    return prepared  # type: ignore[return-value]


def contents(*tensors: Tensor | None) -> list[int | None]:
    """Numbers that differ where the tensors' shapes or values do; read on the host."""
    return [None if x is None else hash((*x.shape, *x.flatten().tolist())) for x in tensors]


def _of_all_ranks(op: str, mesh: Mesh, mine: Settings | str) -> list[Settings | str]:
    """What every rank says, in the order of ranks."""
    told: list[Settings | str] = [mine]
    for group in reversed(groups_of(op, mesh)):
        found: list[list[Settings | str]] = [None] * group.size()
        dist.all_gather_object(found, told, group=group)
        told = [one for part in found for one in part]
    return told
