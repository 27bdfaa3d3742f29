"""Tiles, warps and pipeline stages per chip, head_dim and width of the elements.

bench/results/gpu_audit.csv tells which spill, by 16 bytes at most. Candidates may spill more:
keys' gradients by wgmma do even in plain attention.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from ..._shared.triton.tiles import tile

TABLE = Path(__file__).with_name("configs.json")


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
def config(kernel: str, head_dim: int, itemsize: int, chip: int | str | None) -> Config:
    """How "forward", "dq" or "dkv" is launched for elements of itemsize bytes; chip as from
    `chip_of`.

    Raises NotImplementedError for a chip that has no tile.
    """
    if chip is None:
        return INTERPRETED
    found = tile("attention", TABLE, kernel, head_dim, itemsize, chip)
    return Config(**{name: found[name] for name in Config._fields if name in found})
