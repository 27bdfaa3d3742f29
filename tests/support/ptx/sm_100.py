"""sm_100: tcgen05, products in tensor memory and the ways in and out of it.

Asynchronous work is done at once. The shadows of tensor and shared memory know what nobody may see
or overwrite yet, and tcgen05.ld gives NaN for it. The registers that it loads may be used at once,
as the hardware waits for them; overwriting the place before wait::ld is a finding. tcgen05.fence is
not asked for: barriers are enough here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .matrices import CHUNK, KINDS, decode, places
from .memory import Fault
from .parse import Unknown, vector_of
from .tensor_memory import BAND, COLUMNS, LANES, UNDEFINED, Groups, TensorMemory

# By shape: registers of a repetition; the lane and the cell of register r of thread t.
SHAPES = {
    "32x32b": (1, lambda t, r: (t, r)),
    "16x64b": (1, lambda t, r: (t // 4 + 8 * (t & 1), (t >> 1 & 1) + 2 * r)),
    "16x128b": (2, lambda t, r: (t // 4 + 8 * (r & 1), t % 4 + 4 * (r >> 1))),
    "16x256b": (4, lambda t, r: (t // 4 + 8 * (r >> 1 & 1), 2 * (t % 4) + (r & 1) + 8 * (r >> 2))),
    "16x32bx2": (1, lambda t, r: (t % 16, r)),
}


# Translation


def translate(t, words, operands, mask, at) -> list[str]:
    what = _TRANSLATIONS.get(words[1])
    if what is None or "cta_group::2" in words:
        raise Unknown(".".join(words))
    return what(t, words[2:], operands, mask, at)


def _ld(t, words, operands, mask, at):
    shape, packed = _shape(words, "pack::16b")
    parts = _vector(operands[0], words)
    split = int(operands[2], 0) if len(operands) > 2 else 0
    lines = [
        f"t, s = c.tcgen05.load(c, {_address(t, operands[1])}, {shape!r}, {len(parts)}, "
        f"{packed}, {split}, {mask}, {at})"
    ]
    return lines + [
        f"{t.row(part, 'b32')}[s] = t[{i}]" for i, part in enumerate(parts) if part != "_"
    ]


def _st(t, words, operands, mask, at):
    shape, unpacked = _shape(words, "unpack::16b")
    values = "".join(f"{t.value(part, 'b32')}, " for part in _vector(operands[-1], words))
    split = int(operands[1], 0) if len(operands) > 2 else 0
    return [
        f"c.tcgen05.store(c, {_address(t, operands[0])}, ({values}), {shape!r}, {unpacked}, "
        f"{split}, {mask}, {at})"
    ]


def _mma(t, words, operands, mask, at):
    kind = words[1].removeprefix("kind::")
    if words[0] != "cta_group::1" or len(words) != 2 or kind not in TYPES or len(operands) != 5:
        raise Unknown("tcgen05.mma." + ".".join(words))
    d, a, b, descriptor, accumulate = operands
    in_memory = a.startswith("[")
    a = _address(t, a) if in_memory else t.value(a, "b64")
    accumulate = ("~" if accumulate.startswith("!") else "") + t.value(
        accumulate.lstrip("!"), "pred"
    )
    values = (
        f"{_address(t, d)}, {a}, {t.value(b, 'b64')}, {t.value(descriptor, 'b32')}, {accumulate}"
    )
    return [f"c.tcgen05.multiply(c, {values}, {kind!r}, {in_memory}, {mask}, {at})"]


def _commit(t, words, operands, mask, at):
    if {*words} - {"cta_group::1", "mbarrier::arrive::one", "shared::cluster", "b64"} or len(
        operands
    ) != 1:
        raise Unknown("tcgen05.commit." + ".".join(words))
    return [
        f"c.tcgen05.commit(c, {t.pointer(operands[0], t.wide_pointer(operands[0]))}, {mask}, {at})"
    ]


def _alloc(t, words, operands, mask, at):
    pointer = t.pointer(operands[0], t.wide_pointer(operands[0]))
    return [f"c.tcgen05.allocate(c, {pointer}, {int(operands[1], 0)}, {mask}, {at})"]


def _dealloc(t, words, operands, mask, at):
    return [f"c.tcgen05.free(c, {_address(t, operands[0])}, {int(operands[1], 0)}, {mask}, {at})"]


_TRANSLATIONS = {
    "ld": _ld,
    "st": _st,
    "mma": _mma,
    "commit": _commit,
    "alloc": _alloc,
    "dealloc": _dealloc,
    "relinquish_alloc_permit": lambda t, words, operands, mask, at: [
        f"c.tcgen05.relinquish(c, {mask}, {at})"
    ],
    "wait::ld": lambda t, words, operands, mask, at: [f"c.tcgen05.wait_load(c, {mask}, {at})"],
    "wait::st": lambda t, words, operands, mask, at: [f"c.tcgen05.wait_store(c, {mask}, {at})"],
    "fence::before_thread_sync": lambda *_: [],
    "fence::after_thread_sync": lambda *_: [],
}


def _address(t, operand: str) -> str:
    """Translate an address in tensor memory."""
    base, offset = t.address(operand)
    return f"{t.value(base, 'u32')} + u32({offset})"


def _shape(words, modifier) -> tuple[str, bool]:
    """Parse .sync.aligned.SHAPE.REPETITIONS[.MODIFIER].b32."""
    if (
        words[:2] != ["sync", "aligned"]
        or words[2] not in SHAPES
        or words[-1] != "b32"
        or words[4:-1] not in ([], [modifier])
    ):
        raise Unknown("tcgen05: " + ".".join(words))
    return words[2], modifier in words


def _vector(operand: str, words) -> list[str]:
    parts = vector_of(operand)
    if len(parts) != SHAPES[words[2]][0] * int(words[3][1:]):
        raise Fault(f"{len(parts)} registers for {'.'.join(words)}")
    return parts


# Execution


class Unit:
    """The tensor cores of some blocks, and the memory that is theirs."""

    def __init__(self, machine) -> None:
        warps = machine.padded // 32
        blocks = machine.lanes // machine.padded
        self.machine, self.shared, self.groups = machine, machine.shared, Groups(warps)
        self.memory = TensorMemory(
            blocks, warps, self.groups, machine.findings, machine.random.randrange(COLUMNS)
        )
        self.shared.proxy.groups = self.groups
        self.padded = machine.padded

    def barrier(self, block: int) -> None:
        self.groups.barrier(block)
        self.memory.barrier(block)

    # Instructions: c is the context, mask its lanes

    def load(self, c, pointer, shape, registers, packed, split, mask, at):
        """Return (registers, lanes), and the lanes."""
        access = _Access(self, c, pointer, shape, registers, packed, split, mask, at)
        data = self.memory.data.ravel()
        values = data[access.cells]
        if packed:
            values = values & np.uint32(0xFFFF) | data[access.cells + 1] << np.uint32(16)
        early = self.memory.load(access.place, access.warp, access.at)
        if early.any():
            values[early.any((1, 2))] = UNDEFINED
        return values.transpose(2, 0, 1).reshape(registers, 32 * len(access.cells)), access.lanes

    def store(self, c, pointer, values, shape, unpacked, split, mask, at):
        access = _Access(self, c, pointer, shape, len(values), unpacked, split, mask, at)
        self.memory.store(access.place, access.warp, access.at)
        values = np.stack(
            [np.broadcast_to(x, c.n)[access.lanes].reshape(-1, 32) for x in values], 2
        )
        data = self.memory.data.ravel()
        data[access.cells] = values & np.uint32(0xFFFF) if unpacked else values
        if unpacked:
            data[access.cells + 1] = values >> np.uint32(16)

    def wait_load(self, c, mask, at):
        lanes = 32 * _warps(c, mask, at)
        self.memory.wait_load(c.warp[lanes], self._block(c)[lanes])

    def wait_store(self, c, mask, at):
        lanes = 32 * _warps(c, mask, at)
        self.memory.wait_store(c.warp[lanes], self._block(c)[lanes])

    def allocate(self, c, pointer, columns, mask, at):
        for warp in _warps(c, mask, at).tolist():
            lane = np.arange(c.n) == 32 * warp
            address = self.memory.allocate(int(self._block(c)[32 * warp]), columns, c._name(at))
            c.store_shared(pointer, np.full((c.n, 1), address, np.uint32), 4, lane, at)

    def free(self, c, pointer, columns, mask, at):
        for lane in (32 * _warps(c, mask, at)).tolist():
            address = int(np.broadcast_to(pointer, c.n)[lane])
            self.memory.free(int(self._block(c)[lane]), address, columns, c._name(at))

    def relinquish(self, c, mask, at):
        for block in self._block(c)[32 * _warps(c, mask, at)].tolist():
            self.memory.relinquished[block] = True

    def commit(self, c, pointer, mask, at):
        """Arrive at an mbarrier when all that the thread has issued is complete."""
        lanes = _lanes(c, mask)
        places = self.shared.place(
            np.broadcast_to(pointer, c.n)[lanes], c.base[lanes], 8, c._name(at)
        )
        for lane, place in zip(lanes.tolist(), places.tolist()):
            group = self.groups.commit(int(self._block(c)[lane]), int(c.warp[lane]))
            c.mbarriers.post(
                lambda place=place, group=group: c.mbarriers.arrives(place, group=group)
            )

    def multiply(self, c, d, a, b, descriptor, accumulate, kind, a_in_memory, mask, at):
        """Multiply; the threads elected in several blocks are served together."""
        lanes = _lanes(c, mask)
        asked: dict[tuple, list[int]] = {}
        for lane, *how in zip(
            lanes.tolist(),
            *(np.broadcast_to(x, c.n)[lanes].tolist() for x in (d, a, b, descriptor, accumulate)),
        ):
            asked.setdefault(tuple(how), []).append(lane)
        for (d, a, b, descriptor, accumulate), some in asked.items():
            issuers = _Issuers(self._block(c)[some], c.warp[some], self.groups, c._name(at))
            self._multiply(issuers, product_of(descriptor, kind), d, a, b, accumulate, a_in_memory)

    # Parts of them

    def _block(self, c) -> np.ndarray:
        return c.machine_lanes // self.padded

    def _multiply(self, issuers, what, d, a, b, accumulate, a_in_memory):
        place, rows, columns = _rows(issuers.block, d, what.m, what.n)
        self.memory.check(place, issuers.at)
        operand = None
        if a_in_memory:
            operand, a_rows, a_columns = _rows(issuers.block, a, what.m, 8)
            self.memory.check(operand, issuers.at)
            if (a ^ d) >> 16:
                raise Fault(f"A and D in different lanes of tensor memory: {issuers.at}")
            left = decode(self.memory.data[a_rows, a_columns], what.a)
        else:
            left = self._shared(issuers, a, what.m, what.a, what.a_is_mn_major)
        right = self._shared(issuers, b, what.n, what.b, what.b_is_mn_major)
        for i, (warp, group) in enumerate(zip(issuers.warp.tolist(), issuers.group)):
            one = [None if x is None else (x[0][i : i + 1], *x[1:]) for x in (place, operand)]
            self.memory.multiply(*one, bool(accumulate), warp, group, issuers.at)
        total = np.matmul(-left if what.negate_a != what.negate_b else left, right.swapaxes(1, 2))
        if accumulate:
            total = total + _from_bits(self.memory.data[rows, columns], what.d)
        self.memory.data[rows, columns] = _to_bits(total, what.d)

    def _shared(self, issuers, descriptor, rows, type_, mn_major):
        address = chunks_of(descriptor, rows, type_, mn_major)
        if address.max() + CHUNK > self.shared.limit:
            raise Fault(
                f"out of bounds of {self.shared.limit} bytes of shared memory: {issuers.at}"
            )
        chunk = (issuers.block[:, None] * self.shared.size + address) // CHUNK
        for one, warp, group in zip(chunk, issuers.warp.tolist(), issuers.group):
            self.shared.proxy.reads(one, issuers.at, warp)
            self.shared.proxy.reader[one] = group
        return matrix_of(self.shared.views[CHUNK][chunk], rows, type_, mn_major)


class _Access:
    """The place of a tcgen05.ld or .st of whole warps."""

    def __init__(self, unit, c, pointer, shape, registers, packed, split, mask, at) -> None:
        warps = _warps(c, mask, at)
        every = len(warps) == c.n // 32
        self.lanes = slice(None) if every else (32 * warps[:, None] + np.arange(32)).ravel()
        self.at = c._name(at)
        pointer = np.broadcast_to(pointer, c.n).reshape(-1, 32)[warps].astype(np.int64)
        if (pointer != pointer[:, :1]).any():
            raise Fault(f"addresses differ within a warp: {self.at}")
        block, warp = unit._block(c)[32 * warps], c.warp[32 * warps]
        lane, column = pointer[:, 0] >> 16, pointer[:, 0] & 0xFFFF
        if (lane // 32 != warp % 4).any() or (lane % (32 if shape == "32x32b" else BAND)).any():
            raise Fault(
                f"lanes {lane.tolist()} of tensor memory, by warps {warp.tolist()}: {self.at}"
            )
        cells, bands, columns = _fragment(shape, registers, packed, split)
        self.warp = warp[:, None, None]
        self.place = (
            block[:, None, None],
            (lane[:, None] // BAND + bands)[:, :, None],
            (column[:, None] + columns)[:, None, :],
        )
        unit.memory.check(self.place, self.at)
        self.cells = ((block * LANES + lane) * COLUMNS + column)[:, None, None] + cells


class _Issuers:
    """Elected threads of several blocks."""

    def __init__(self, block, warp, groups, at) -> None:
        self.block, self.warp, self.at = block, warp, at
        if len(np.unique(block)) < len(block):
            raise Fault(f"several threads of a block ask for one product: {at}")
        self.group = [groups.current(*who) for who in zip(block.tolist(), warp.tolist())]


@lru_cache
def _fragment(shape: str, registers: int, packed: bool, split: int):
    """Return cells (32 threads, registers) relative to an address, the first of two where packed.

    With them the bands and columns of all.
    """
    thread, register = np.ogrid[:32, :registers]
    lane, column = np.broadcast_arrays(*SHAPES[shape][1](thread, register))
    column = column * (2 if packed else 1) + (thread // 16 * split if shape == "16x32bx2" else 0)
    columns = np.unique(np.concatenate([column, column + 1]) if packed else column)
    return lane * COLUMNS + column, np.unique(lane // BAND), columns


def _rows(blocks, address, m, columns):
    """Find m rows from an address on: place in the shadow, indices into the data."""
    lane, column = address >> 16, address & 0xFFFF
    row = np.arange(m)
    if m == 64:  # 16 of the 32 lanes of each warp
        row = row // 16 * 32 + row % 16
    column = column + np.arange(columns)
    place = (
        blocks[:, None, None],
        np.unique((lane + row) // BAND)[None, :, None],
        column[None, None, :],
    )
    return place, (blocks[:, None] * LANES + lane + row)[:, :, None], column


def _from_bits(bits, type_):
    return (
        bits.astype(np.uint16).view(np.float16).astype(np.float32)
        if type_ == "f16"
        else bits.view(np.float32)
    )


def _to_bits(total, type_):
    return (
        total.astype(np.float16).view(np.uint16).astype(np.uint32)
        if type_ == "f16"
        else total.view(np.uint32)
    )


def _lanes(c, mask) -> np.ndarray:
    return np.arange(c.n) if mask is None else mask.nonzero()[0]


def _warps(c, mask, at) -> np.ndarray:
    return np.arange(c.n // 32) if mask is None else c.whole(mask, at).nonzero()[0]


# Descriptors: what is multiplied, and where in shared memory it lies

# By kind: the types of A and B, by their numbers.
TYPES = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}, "f8f6f4": {0: "e4m3", 1: "e5m2"}}
RESULTS = {0: "f16", 1: "f32"}


class Product(NamedTuple):
    """What an instruction descriptor says."""

    m: int
    n: int
    a: str
    b: str
    d: str
    negate_a: bool
    negate_b: bool
    a_is_mn_major: bool
    b_is_mn_major: bool


@lru_cache
def product_of(descriptor: int, kind: str) -> Product:
    def field(at: int, bits: int) -> int:
        return descriptor >> at & (1 << bits) - 1

    if field(0, 4) or field(6, 1) or field(23, 1) or field(29, 3):
        raise Unknown(
            f"instruction descriptor {descriptor:#010x}: sparse, saturating or with a shift"
        )
    a, b, d = TYPES[kind].get(field(7, 3)), TYPES[kind].get(field(10, 3)), RESULTS.get(field(4, 2))
    if None in (a, b, d) or (d == "f16" and kind == "tf32"):
        raise Unknown(f"instruction descriptor {descriptor:#010x}: types for kind::{kind}")
    m, n = 16 * field(24, 5), 8 * field(17, 6)
    if m not in (64, 128) or n % (8 if m == 64 else 16) or not 8 <= n <= 256:
        raise Fault(f"instruction descriptor {descriptor:#010x}: {m} x {n}")
    if kind == "tf32" and (field(15, 1) or field(16, 1)):
        raise Unknown("operands of 32 bits that are not K-major")
    return Product(m, n, a, b, d, *(bool(field(at, 1)) for at in (13, 14, 15, 16)))


@lru_cache
def chunks_of(descriptor: int, rows: int, type_: str, mn_major: bool) -> np.ndarray:
    """List the addresses of a matrix's chunks, in order of rows, or of k where it is MN-major."""
    version, origin, mode, swizzle = (
        descriptor >> 46 & 3,
        descriptor >> 49 & 7,
        descriptor >> 52 & 1,
        descriptor >> 61,
    )
    if version != 1 or origin or mode or swizzle & 1:
        raise Unknown(f"shared memory descriptor {descriptor:#018x}")
    return places(
        np.array([descriptor], np.uint64).view(np.int64), rows, mn_major, 32 // KINDS[type_]
    )[0]


def matrix_of(data: np.ndarray, rows: int, type_: str, mn_major: bool) -> np.ndarray:
    """Decode chunks (blocks, chunks) to float32 (blocks, rows, k)."""
    values = decode(data, type_)
    return (
        values.reshape(len(data), -1, rows).swapaxes(1, 2)
        if mn_major
        else values.reshape(len(data), rows, -1)
    )
