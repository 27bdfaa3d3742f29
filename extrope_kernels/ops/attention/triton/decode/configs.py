"""Tiles, warps and pipeline stages per chip, head_dim and width of the elements."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from ...._shared.triton.tiles import tile

TABLE = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """What one kernel is launched with."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    warps: int
    stages: int  # blocks of keys from the one that is loaded to the one in use, both counted
    maxnreg: int | None = None  # or ptxas spills to fit one more block than the grid has


INTERPRETED = Config(16, 16, 1, 1)


@functools.cache
def config(kernel: str, head_dim: int, itemsize: int, chip: int | str | None) -> Config:
    """How `kernel` is launched for elements of itemsize bytes; chip as from `chip_of`.

    Raises NotImplementedError for a chip that has no tile.
    """
    if chip is None:
        return INTERPRETED
    found = tile("decode", TABLE, kernel, head_dim, itemsize, chip)
    return Config(**{name: found[name] for name in Config._fields if name in found})
