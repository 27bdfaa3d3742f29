"""Tiles, warps and pipeline stages per chip, head_dim and width of the elements.

configs.json is what kernels are launched with, candidates.json what else is worth timing on a card.
Those that are used compile without spills but for three regions at head_dim 96 on sm_120 and 256 on
sm_80 (56 and 32 bytes). Candidates may spill: keys' gradients by wgmma do even in plain attention.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple


class Config(NamedTuple):
    """What one kernel is launched with."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    halves: bool = False  # rows of head_dim in two parts: see rows.py
    rotated: int = 64  # rows of queries that are rotated at a time between two regions
    maxnreg: int | None = None  # or ptxas spills to fit one more block than need be


MOST_ROWS = 128  # of any block
INTERPRETED = Config(16, 16, 1, 1)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict]]]:
    """By kernel, chip (also for those after it, up to the next one), and head_dim up to."""
    return json.loads(Path(__file__).with_name("configs.json").read_text())


@functools.cache
def config(kernel: str, head_dim: int, itemsize: int, chip: int | str | None) -> Config:
    """How "forward", "dq" or "dkv" is launched for elements of itemsize bytes; chip as from
    `chip_of`.

    Raises NotImplementedError for a chip that has no tile.
    """
    if chip is None:
        return INTERPRETED
    rows = _row(_table()[kernel], chip, itemsize)
    if rows is None:
        raise NotImplementedError(
            f"attention: the Triton kernels have no tile for {itemsize}-byte elements on {chip}"
        )
    found = rows[min((n for n in rows if head_dim <= int(n)), key=int)]
    return Config(**{name: found[name] for name in Config._fields if name in found})


def _row(chips: dict[str, dict[str, dict]], chip: int | str, itemsize: int) -> dict | None:
    if not isinstance(chip, int):
        return chips.get(chip if itemsize < 4 else f"{chip} float32")
    if itemsize == 4:  # products without tensor cores, from registers: alike on all chips
        return chips["float32"]
    # 10.x and 11.x share a family; what is older than all has no more memory than 8.6.
    known = [int(name) for name in chips if name.isdigit()]
    return chips[str(max((n for n in known if n <= chip), default=86))]
