"""Tiles, warps and pipeline stages by chip, head_dim and size of the elements.

configs.json has those in use, candidates.json others worth timing on a card. A chip's row also
serves later chips, up to the next row; a row of a head_dim serves smaller ones too. NVIDIA's
float32 products run without tensor cores, so its rows serve all chips. An AMD chip without a row
takes the nearest one's: gfx942 has wavefronts of 64 threads, gfx1100 of 32.

bench/results/gpu_audit.csv lists those that spill, by 16 bytes at most (24 with Triton 3.7.1:
bench/gpu_audit.py). Candidates may spill more: gradients of keys by wgmma spill even in plain
attention.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..._math.triton.launch import chip_of

TABLE = Path(__file__).with_name("configs.json")
LEAST_SHARED = 86  # the NVIDIA chip with the least shared memory; older ones have no more
MOST_ROWS = 128  # in any block


class Config(NamedTuple):
    """The launch settings of one kernel."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    warps: int
    stages: int  # blocks of keys from the one being loaded to the one in use, including both
    halves: bool = False  # rows come in two tiles: see Blocks in device.py
    rotated: int = 64  # rows of queries to rotate at a time between two regions
    maxnreg: int | None = None  # without it, ptxas may spill to fit one more block than needed

    @property
    def options(self) -> dict[str, Any]:
        """The settings as launch options of Triton."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


INTERPRETED = Config(16, 16, 1, 1)


@functools.cache
def config(kernel: str, head_dim: int, itemsize: int, chip: int | str | None) -> Config:
    """Return a kernel's settings for elements of itemsize bytes; chip: from `chip_of`.

    Raises NotImplementedError for float64.
    """
    if itemsize > 4:
        op = "attention" if kernel in ("forward", "dq", "dkv") else "decode"
        raise NotImplementedError(
            f"{op}: the Triton kernels do not take float64 (backend='reference' does)"
        )
    if chip is None:
        return INTERPRETED
    found = leaf(kernel, head_dim, itemsize, chip)
    return Config(**{name: found[name] for name in Config._fields if name in found})


def config_of(kernel: str, q: Tensor, v: Tensor) -> Config:
    """Return a kernel's settings for these tensors."""
    return config(kernel, max(q.shape[-1], v.shape[-1]), q.itemsize, chip_of(q))


def leaf(kernel: str, head_dim: int, itemsize: int, chip: int | str) -> dict[str, Any]:
    """Return a kernel's entry in the table."""
    rows = _rows(table()[kernel], chip, itemsize)
    return rows[min((n for n in rows if head_dim <= int(n)), key=int)]


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict]]]:
    """Return configs.json: settings by kernel, chip and head_dim."""
    return json.loads(TABLE.read_text())


def _rows(chips: dict[str, dict], chip: int | str, itemsize: int) -> dict[str, dict]:
    """Return a chip's rows by head_dim."""
    if isinstance(chip, str):
        listed = sorted({name.split()[0] for name in chips if name.startswith("gfx")})
        nearest = min(listed, key=lambda name: abs(_number(name) - _number(chip)))
        return chips[nearest if itemsize < 4 else f"{nearest} float32"]
    if itemsize == 4:
        return chips["float32"]
    known = [int(name) for name in chips if name.isdigit()]
    older = LEAST_SHARED if LEAST_SHARED in known else min(known)
    return chips[str(max((n for n in known if n <= chip), default=older))]


def _number(chip: str) -> int:
    """Return the number in an AMD chip's name, which is hexadecimal: gfx90a."""
    return int(chip.removeprefix("gfx"), 16)
