"""Find and decode the matrices of wgmma and tcgen05, by the layouts of the PTX manual.

They lie in shared memory, where descriptors say, or in the registers of a warpgroup. A row of A, or
a column of B, has 32 bytes whatever the type: 16 elements of 16 bits, 8 of tf32, 32 of 8 bits.
"""

from __future__ import annotations

import functools

import numpy as np

from .arithmetic import fp8_values, from_bf16

GROUP = 128  # threads
ROWS = 64
CHUNK = 16  # bytes
SWIZZLE = {0: 1, 3: 2, 2: 4, 1: 8}  # the descriptor's mode -> chunks in a row of the pattern
KINDS = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32}  # -> k


@functools.cache
def _pattern(
    rows: int, leading: int, stride: int, width: int, transposed: bool, size: int
) -> np.ndarray:
    """List the chunks' offsets before the swizzle, in order of rows (transposed: of k).

    width: chunks in a row of the pattern, 1 where nothing is swizzled. Eight such rows are an atom.
    """
    if transposed:
        k, block = np.divmod(np.arange(2 * rows), rows * size // CHUNK)
        along, across = (stride, leading) if width == 1 else (leading, stride)
        return (
            block % width * CHUNK + block // width * along + k % 8 * width * CHUNK + k // 8 * across
        )
    row, half = np.divmod(np.arange(2 * rows), 2)
    return row % 8 * width * CHUNK + row // 8 * stride + half * (leading if width == 1 else CHUNK)


def places(descriptor: np.ndarray, rows: int, transposed: bool, size: int = 2) -> np.ndarray:
    """List the addresses of a matrix's chunks for every descriptor.

    size: bytes of an element, which matter where the matrix is transposed.
    """
    place = np.empty((len(descriptor), 2 * rows), np.int64)
    layouts = descriptor >> 14 << 14
    for layout in np.unique(layouts):
        some = layouts == layout
        place[some] = _places(descriptor[some], int(layout), rows, transposed, size)
    return place


def _places(
    descriptor: np.ndarray, layout: int, rows: int, transposed: bool, size: int
) -> np.ndarray:
    start, leading, stride = (16 * (x & 0x3FFF) for x in (descriptor, layout >> 16, layout >> 32))
    origin, width = layout >> 49 & 7, SWIZZLE[layout >> 62 & 3]
    place = start[:, None] + _pattern(rows, leading, stride, width, transposed, size)
    return place ^ (((place >> 7) - origin & (width - 1)) << 4)


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    data = np.ascontiguousarray(data)
    if kind == "bf16":
        return from_bf16(data.view(np.uint16))
    if kind == "f16":
        return data.view(np.float16).astype(np.float32)
    if kind == "tf32":  # the upper 19 bits count
        return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return fp8_values(kind)[data.view(np.uint8)]


# With thread = 32 warp + 4 g + t, the accumulators are pairs of columns, 2 t and 2 t + 1 of blocks
# of eight, for row 16 warp + g and
# then for the one 8 below.


def from_fragments(registers: np.ndarray, half: bool) -> np.ndarray:
    """(registers, groups, threads) -> (groups, rows, columns)"""
    count, groups, _ = registers.shape
    if half:
        values = (
            registers.view(np.float16)
            .reshape(count // 2, 2, groups, 4, 8, 4, 2)
            .transpose(2, 3, 1, 4, 0, 5, 6)
        )
    else:
        values = (
            registers.view(np.float32)
            .reshape(count // 4, 2, 2, groups, 4, 8, 4)
            .transpose(3, 4, 1, 5, 0, 6, 2)
        )
    return values.astype(np.float32).reshape(groups, ROWS, -1)


def to_fragments(values: np.ndarray, half: bool) -> np.ndarray:
    groups = len(values)
    values = values.reshape(groups, 4, 2, 8, -1, 4, 2)
    if half:
        values = np.ascontiguousarray(values.transpose(4, 2, 0, 1, 3, 5, 6).astype(np.float16))
    else:
        values = np.ascontiguousarray(values.transpose(4, 2, 6, 0, 1, 3, 5))
    return values.view(np.uint32).reshape(-1, groups, GROUP)


def rows_from_fragments(registers: np.ndarray, kind: str) -> np.ndarray:
    """Decode A: words t and t + 4 of row 16 warp + g, each followed by that 8 rows below.

    Returns: (groups, rows, k)
    """
    groups = registers.shape[1]
    words = (
        registers.reshape(2, 2, groups, 4, 8, 4)
        .transpose(2, 3, 1, 4, 0, 5)
        .reshape(groups, ROWS, 8)
    )
    return decode(words, kind).reshape(groups, ROWS, -1)
