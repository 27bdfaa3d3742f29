"""sm_80: mma.sync and the loads and stores of its operands, in the layouts of the PTX manual.

With lane = 4 g + t, a register of two elements (tf32: one) holds columns 2 t and 2 t + 1 (tf32: t)
of row g of an 8 x 8 (8 x 4) block. Registers in order of lanes are thus the rows of that block.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import from_bf16
from .memory import Fault
from .parse import Unknown, vector_of

# Translation


def translate_ldmatrix(t, words, operands, mask, at):
    if "m8n8" not in words or "b16" not in words:
        raise Unknown(".".join(words))
    parts = vector_of(operands[0])
    pointer = t.pointer(operands[1], t.wide_pointer(operands[1]))
    lines = [f"t, s = c.ldmatrix({pointer}, {len(parts)}, {'trans' in words}, {mask}, {at})"]
    return lines + [f"{t.row(part, 'b32')}[s] = t[{i}]" for i, part in enumerate(parts)]


def translate_stmatrix(t, words, operands, mask, at):
    if "m8n8" not in words or "b16" not in words:
        raise Unknown(".".join(words))
    parts = vector_of(operands[1])
    pointer = t.pointer(operands[0], t.wide_pointer(operands[0]))
    values = ", ".join(t.value(part, "b32") for part in parts)
    return [f"c.stmatrix({pointer}, ({values},), {'trans' in words}, {mask}, {at})"]


def translate_mma(t, words, operands, mask, at):
    shape, kinds = words[3], words[6:]
    allowed = {
        ("m16n8k16", "bf16"),
        ("m16n8k16", "f16"),
        ("m16n8k8", "tf32"),
        ("m16n8k8", "bf16"),
        ("m16n8k8", "f16"),
    }
    if (
        (shape, kinds[1]) not in allowed
        or kinds[0] != "f32"
        or kinds[3] != "f32"
        or words[4:6] != ["row", "col"]
    ):
        raise Unknown(".".join(words))
    d, a, b, c = (vector_of(x) for x in operands)
    lines = [] if mask is None else [f"c.whole({mask}, {at})"]
    read = ["(" + ", ".join(t.value(x, "b32") for x in part) + ",)" for part in (a, b)]
    sums = "(" + ", ".join(f"{t.value(x, 'f32')}" for x in c) + ")"
    lines.append(f"t = M.mma({read[0]}, {read[1]}, {sums}, {kinds[1]!r})")
    for i, name in enumerate(d):
        lines += t.put(name, "f32", f"t[{i}]", mask)
    return lines


# Execution


def _block(register, kind):
    """View a register over lanes as blocks (warps, 8, 8), tf32 (warps, 8, 4), in float32."""
    if kind == "tf32":
        # The tensor core looks at the upper 19 bits alone.
        return (register & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4)
    halves = register.view(np.uint16)
    values = from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)
    return values.reshape(-1, 8, 8)


def mma(a, b, c, kind):
    """Multiply m16n8k16 (tf32: k8); products are exact, sums are numpy's, not truncated.

    a: 4 registers (2 for k8 of 16 bits); b: half as many; c and the result: 4 float32 registers.
    """
    rows = [
        np.concatenate([_block(a[i], kind) for i in range(first, len(a), 2)], 2) for first in (0, 1)
    ]
    left = np.concatenate(rows, 1)  # a0 above a1, a2 right of a0
    right = np.concatenate([_block(x, kind) for x in b], 2)  # (warps, n, k)
    # Warp, upper or lower, lane, column.
    product = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 2, 32, 2)
    return [product[:, i, :, j].ravel() + c[2 * i + j] for i in range(2) for j in range(2)]


_LANE = np.arange(32)


def ldmatrix(shared, address, base, warp, count, transposed, at):
    """Load 8 x 8 blocks of 16 bits; row i of block m is where lane 8 m + i points.

    Returns: (count, lanes) registers.
    """
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
    """Store blocks as ldmatrix loads them."""
    count = len(registers)
    # Warp, block, lane: rows of blocks one after another.
    words = np.stack([x.reshape(-1, 32) for x in registers], 1)
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
    """Return which warps run a .sync instruction; raise where a part of one does."""
    by_warp = mask.reshape(-1, 32)
    every, some = by_warp.all(1), by_warp.any(1)
    if (every != some).any():
        raise Fault(f"a part of a warp reached {at}")
    return every
