"""Tiles, warps and pipeline stages per chip, head_dim and width of the elements."""

from typing import NamedTuple


class Config(NamedTuple):
    """What one kernel is launched with."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    halves: bool = False  # rows of head_dim in two parts: see rows.py


MOST_ROWS = 128  # of any block
INTERPRETED = Config(16, 16, 1, 1)

# By kernel, chip (also for those after it, up to the next one), and head_dim up to. All compile
# without spills. Tiles of keys' gradients at head_dim 128 on sm_90 are small because larger ones
# take wgmma, and then spill even in plain attention.
_TABLE: dict[str, dict[int, dict[int, Config]]] = {
    "forward": {
        80: {
            128: Config(128, 64, 8, 2, halves=True),
            256: Config(64, 64, 8, 2, halves=True),
        },
        86: {
            128: Config(128, 64, 8, 2, halves=True),
            256: Config(64, 32, 8, 2, halves=True),
        },
        90: {
            64: Config(128, 128, 8, 2),
            128: Config(128, 64, 8, 3, halves=True),
            256: Config(64, 32, 8, 2, halves=True),
        },
        100: {
            64: Config(128, 128, 8, 2, halves=True),
            128: Config(128, 64, 8, 3, halves=True),
            256: Config(64, 32, 8, 2, halves=True),
        },
        120: {
            64: Config(128, 64, 8, 2, halves=True),
            96: Config(128, 32, 8, 3),
            128: Config(128, 64, 8, 2, halves=True),
            256: Config(64, 32, 8, 2, halves=True),
        },
    },
    "dq": {
        80: {64: Config(128, 64, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(64, 32, 8, 1)},
        86: {
            64: Config(128, 64, 8, 1, halves=True),
            128: Config(64, 64, 8, 1),
            256: Config(64, 32, 8, 1),
        },
        90: {
            64: Config(128, 64, 8, 2),
            128: Config(128, 64, 8, 2, halves=True),
            256: Config(32, 32, 8, 1),
        },
        100: {
            64: Config(128, 64, 8, 2),
            128: Config(128, 64, 8, 3, halves=True),
            256: Config(32, 32, 8, 1),
        },
        120: {64: Config(128, 64, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(32, 32, 8, 1)},
    },
    "dkv": {
        80: {64: Config(32, 128, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(32, 32, 8, 1)},
        86: {64: Config(32, 128, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(32, 32, 8, 1)},
        90: {64: Config(64, 64, 8, 1), 128: Config(32, 32, 4, 1), 256: Config(32, 32, 8, 1)},
        100: {
            64: Config(64, 64, 8, 1),
            128: Config(64, 64, 8, 1, halves=True),
            256: Config(32, 32, 8, 1),
        },
        120: {64: Config(32, 64, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(32, 32, 8, 1)},
    },
}

# float32 products run without tensor cores, from registers: by kernel, on every chip, and head_dim
# up to. At one stage, operands of products wait in registers as well, where they may not fit.
_FLOAT32: dict[str, dict[int, Config]] = {
    "forward": {
        64: Config(32, 32, 8, 1),
        96: Config(32, 32, 8, 1, halves=True),
        128: Config(32, 32, 8, 1),
        256: Config(16, 16, 8, 1, halves=True),
    },
    "dq": {
        64: Config(32, 32, 8, 1),
        96: Config(16, 16, 8, 1),  # a third of a row would be too short for 16 bytes a thread
        256: Config(16, 16, 8, 2, halves=True),
    },
    "dkv": {
        64: Config(32, 32, 8, 2),
        96: Config(16, 32, 8, 1),
        128: Config(32, 32, 8, 1, halves=True),
        256: Config(16, 16, 8, 1),
    },
}


def config(kernel: str, head_dim: int, itemsize: int, capability: int | None) -> Config:
    """The setting of `kernel` ("forward", "dq", "dkv"); capability None: interpreted."""
    if capability is None:
        return INTERPRETED
    rows = _TABLE[kernel]
    # Chips that are not listed are like the last one before them; 10.x and 11.x share a family.
    chip = max((listed for listed in rows if listed <= capability), default=86)
    by_dim = _FLOAT32[kernel] if itemsize == 4 else rows[chip]
    return next(row for dims, row in by_dim.items() if head_dim <= dims)
