"""Tensor core products and their loads, in the layouts of the PTX manual.

With lane = 4 g + t, a register of two (or one, for tf32) elements holds columns 2 t and 2 t + 1 (or t) of row g of an 8 x 8
(8 x 4) block. Over a warp, registers in order of lanes are therefore the rows of that block.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import from_bf16
from .memory import Fault


def _block(register, kind):
    """A register over the lanes of some warps -> (warps, 8, 8) or, for tf32, (warps, 8, 4) float32."""
    if kind == "tf32":
        # The tensor core looks at the upper 19 bits alone.
        return (register & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4)
    halves = register.view(np.uint16)
    values = from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)
    return values.reshape(-1, 8, 8)


def mma(a, b, c, kind):
    """m16n8k16 (k8 for tf32): c and the result are 4 float32 rows over lanes, a 4 registers (2 for k8 of 16 bits), b half as many.

    Products are exact in float32; their sum is rounded as numpy does it, where tensor cores truncate.
    """
    rows = [
        np.concatenate([_block(a[i], kind) for i in range(first, len(a), 2)], 2) for first in (0, 1)
    ]
    left = np.concatenate(rows, 1)  # a0 above a1, a2 right of a0
    right = np.concatenate([_block(x, kind) for x in b], 2)  # (warps, n, k)
    product = np.matmul(left, right.transpose(0, 2, 1)).reshape(
        -1, 2, 32, 2
    )  # warp, upper or lower, lane, column
    return [product[:, i, :, j].ravel() + c[2 * i + j] for i in range(2) for j in range(2)]


_LANE = np.arange(32)


def ldmatrix(shared, address, base, warp, count, transposed, at):
    """8 x 8 blocks of 16 bits; row i of block m is where lane 8 m + i points. Returns (count, lanes) registers."""
    rows = np.zeros((len(address) // 32, 32), bool)
    rows[:, : 8 * count] = True
    rows = rows.ravel()
    place = shared.place(address[rows], base[rows], 16, at)
    shared.note_read(place, 16, warp[rows], at)
    place = place.reshape(-1, count, 8)
    if transposed:
        halves = shared.views[2]
        column = _LANE // 4
        low = halves[place[:, :, 2 * (_LANE % 4)] // 2 + column]
        high = halves[place[:, :, 2 * (_LANE % 4) + 1] // 2 + column]
        words = low.astype(np.uint32) | (high.astype(np.uint32) << 16)
    else:
        words = shared.views[4][place[:, :, _LANE // 4] // 4 + _LANE % 4]
    return words.transpose(1, 0, 2).reshape(count, -1)


def stmatrix(shared, address, base, warp, registers, transposed, at):
    """ldmatrix the other way round."""
    count = len(registers)
    words = np.stack(
        [x.reshape(-1, 32) for x in registers], 1
    )  # warp, block, lane: rows of blocks one after another
    blocks = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
    blocks = np.ascontiguousarray(blocks.swapaxes(2, 3) if transposed else blocks)
    rows = np.tile(8 * count > _LANE, len(address) // 32)
    shared.store(
        shared.place(address[rows], base[rows], 16, at),
        blocks.view("<c16").ravel(),
        16,
        warp[rows],
        at,
    )


def whole_warps(mask, at):
    """A .sync instruction wants all lanes of a warp or none."""
    by_warp = mask.reshape(-1, 32)
    every, some = by_warp.all(1), by_warp.any(1)
    if (every != some).any():
        raise Fault(f"a part of a warp reached {at}")
    return every
