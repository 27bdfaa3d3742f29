"""Tiles, warps and pipeline stages per chip, head_dim and width of the elements: configs.json.

configs.json is what ships, candidates.json what else is worth timing on a card. A row of a chip
holds for those after it too, up to the next one, and one of a head_dim up to that. Float32, whose
products run without tensor cores, has rows that serve all of a maker's chips.

bench/results/gpu_audit.csv tells which spill, by 16 bytes at most. Candidates may spill more:
keys' gradients by wgmma do even in plain attention.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..._shared.triton.launch import chip_of

TABLE = Path(__file__).with_name("configs.json")
LEAST_SHARED = 86  # of NVIDIA's chips; older ones have no more shared memory
MOST_ROWS = 128  # of any block


class Config(NamedTuple):
    """What one kernel is launched with."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    warps: int
    stages: int  # blocks of keys from the one that is loaded to the one in use, both counted
    halves: bool = False  # rows of head_dim in two parts: see device.py
    rotated: int = 64  # rows of queries that are rotated at a time between two regions
    maxnreg: int | None = None  # or ptxas spills to fit one more block than need be

    @property
    def options(self) -> dict[str, Any]:
        """As Triton takes them at a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


INTERPRETED = Config(16, 16, 1, 1)


@functools.cache
def config(kernel: str, head_dim: int, itemsize: int, chip: int | str | None) -> Config:
    """How a kernel is launched for elements of itemsize bytes; chip as from `chip_of`.

    Raises NotImplementedError for a chip that has no tile.
    """
    if chip is None:
        return INTERPRETED
    found = leaf(kernel, head_dim, itemsize, chip)
    return Config(**{name: found[name] for name in Config._fields if name in found})


def config_of(kernel: str, q: Tensor, v: Tensor) -> Config:
    """How a kernel is launched for these tensors."""
    return config(kernel, max(q.shape[-1], v.shape[-1]), q.itemsize, chip_of(q))


def leaf(kernel: str, head_dim: int, itemsize: int, chip: int | str) -> dict[str, Any]:
    """What the table has."""
    rows = _row(table()[kernel], chip, itemsize)
    if rows is None:
        op = "attention" if kernel in ("forward", "dq", "dkv") else "decode"
        raise NotImplementedError(
            f"{op}: the Triton kernels have no tile for {itemsize}-byte elements on {chip}"
        )
    return rows[min((n for n in rows if head_dim <= int(n)), key=int)]


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict]]]:
    return json.loads(TABLE.read_text())


def _row(chips: dict[str, dict], chip: int | str, itemsize: int) -> dict[str, dict] | None:
    if not isinstance(chip, int):
        return chips.get(chip if itemsize < 4 else f"{chip} float32")
    if itemsize == 4:
        return chips["float32"]
    known = [int(name) for name in chips if name.isdigit()]
    older = LEAST_SHARED if LEAST_SHARED in known else min(known)
    return chips[str(max((n for n in known if n <= chip), default=older))]
