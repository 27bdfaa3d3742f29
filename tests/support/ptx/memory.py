"""Global memory, which holds copies of tensors, and shared memory; both know who touched what."""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np

SCALAR = {
    1: "<u1",
    2: "<u2",
    4: "<u4",
    8: "<u8",
    16: "<c16",
}  # 16 bytes travel as a complex number, which numpy copies as it is
PENDING, NOBODY = -2, -1
SEVERAL = PENDING
EVERYWHERE = -(2**31)


class Fault(Exception):
    """A GPU would fault here, or its behaviour is undefined."""


class Findings(Counter):
    """Count races and the like, by kind and instruction."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: Counter = Counter()  # what changes rounding alone

    def add(self, kind: str, at: str, count: int) -> None:
        self[f"{kind}: {at}"] += int(count)

    def conflict(self, kind: str, at: str, one: np.ndarray, other: np.ndarray) -> None:
        """Add that two threads leave different values in one place.

        Where they are the same sum but for its rounding, that is a note: LLVM contracts one side of
        a butterfly a * b + shfl(a * b) to an fma, so its lanes differ in the last bit.
        """
        a, b = (
            np.ascontiguousarray(x).view(np.float32) if x.dtype.itemsize >= 4 else x
            for x in (one, other)
        )
        if a.dtype == np.float32 and bool(
            np.all((a == b) | (np.abs(a - b) <= 1e-5 * np.abs(a).max()))
        ):
            self.notes[f"{kind}, by a rounding: {at}"] += len(one)
        else:
            self.add(kind, at, len(one))


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compare bit by bit: NaN is like itself."""
    if a.dtype.itemsize < 16:
        return a != b
    return (a.view(np.uint64) != b.view(np.uint64)).reshape(-1, 2).any(1)


def _extent(tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


class Global:
    """The tensors that a launch was given, at addresses of their own, far from one another.

    An access is in bounds where each of its bytes belongs to an element of a tensor: not behind its
    end, nor between the rows of a strided one. It is a finding when threads see one another's
    results within the launch, unless they are of one block and a barrier lies between, or of two
    and one of them released after a barrier, by an atomic, what the other acquired before one.
    """

    BASE, GAP, ALIGN = 0x7F0000000000, 1 << 17, 256
    UNIT = 2  # bytes that the shadow tells apart

    def __init__(self, tensors, findings: Findings) -> None:
        merged: list[list[int]] = []  # views of one storage overlap
        for start, end in sorted({_extent(x) for x in tensors}):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            elif end > start:
                merged.append([start, end])
        self.ranges, size = [], self.GAP
        for start, end in merged:
            # Tensors stay as aligned as they are.
            size = -(-size // self.ALIGN) * self.ALIGN + start % self.ALIGN
            self.ranges.append((start, end, size))
            size += end - start + self.GAP
        size = -(-size // 16) * 16
        self.data, self.valid = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.views = {n: self.data.view(SCALAR[n]) for n in SCALAR}
        for start, end, at in self.ranges:
            self.data[at : at + end - start] = _host(start, end)
        for x in tensors:
            if x.numel():
                item = x.element_size()
                strides = (*(item * n for n in x.stride()), 1)
                place = self.valid[self.address(x) - self.BASE :]
                np.lib.stride_tricks.as_strided(place, (*x.shape, item), strides)[...] = 0xFF
        # By unit: the last thread that stored, and the one that loaded.
        self.writer = np.full(size // self.UNIT, NOBODY, np.int32)
        self.reader = np.full(size // self.UNIT, NOBODY, np.int32)
        # And in which of the intervals between barriers of their blocks.
        self.stored, self.loaded = (
            np.zeros(size // self.UNIT, np.int32),
            np.zeros(size // self.UNIT, np.int32),
        )
        self.launched(1 << 30, 1)
        self.findings = findings

    def launched(self, threads: int, blocks: int) -> None:
        """Begin a launch of so many threads a block."""
        self.threads, self.interval = threads, np.zeros(blocks, np.int32)
        # By block, how many intervals of each block lie behind it; none of EVERYWHERE, in the end.
        self.behind = np.zeros((blocks, blocks + 1), np.int32)
        self.acquired: dict[int, np.ndarray] = {}  # by block, what is behind its next barrier
        self.released: dict[int, np.ndarray] = {}  # by place, what is behind who adds to it

    def barrier(self, block: int) -> None:
        self.interval[block] += 1
        behind = self.behind[block]
        np.maximum(behind, self.acquired.pop(block, behind), out=behind)
        behind[block] = self.interval[block]

    def _apart(self, other: np.ndarray, interval: np.ndarray, who: np.ndarray) -> np.ndarray:
        """Tell which of these are other threads' work with no barrier behind it."""
        apart = (other != NOBODY) & (other != who)
        if apart.any():
            block = who // self.threads
            theirs = np.where(other < 0, SEVERAL - other, other // self.threads)
            apart &= interval >= self.behind[block, np.minimum(theirs, len(self.interval))]
        return apart

    def _joined(self, reader: np.ndarray, who: np.ndarray) -> np.ndarray:
        """Return the one reader of a place, or SEVERAL less the block of several."""
        alone = (reader == NOBODY) | (reader == who)
        if alone.all():
            return who
        block = who // self.threads
        theirs = np.where(reader < 0, SEVERAL - reader, reader // self.threads)
        return np.where(alone, who, np.where(theirs == block, SEVERAL - block, EVERYWHERE))

    def address(self, tensor) -> int:
        pointer = tensor.data_ptr()
        for start, end, at in self.ranges:
            if start <= pointer < end:
                return self.BASE + at + pointer - start
        return self.BASE  # an empty tensor: of no use to anyone

    def copy_back(self) -> None:
        for start, end, at in self.ranges:
            _host(start, end)[...] = self.data[at : at + end - start]

    def _place(self, address: np.ndarray, size: int, at: str) -> np.ndarray:
        place = address.astype(np.int64) - self.BASE
        if (address.astype(np.int64) & (size - 1)).any():
            raise Fault(f"misaligned access of {size} bytes to global memory: {at}")
        outside = (place < 0) | (place + size > len(self.data))
        if not outside.any():
            width = min(size, 8)
            valid, whole = self.valid.view(SCALAR[width]), np.iinfo(SCALAR[width]).max
            outside = valid[place // width] != whole
            if size == 16:
                outside |= valid[place // width + 1] != whole
        if outside.any():
            wrong = int(place[outside][0])
            ends = [
                (abs(wrong - (low + end - start)), end - start, wrong - low)
                for start, end, low in self.ranges
            ]
            _, length, offset = min(ends, default=(0, 0, wrong))
            raise Fault(
                f"out of bounds: {size} bytes at offset {offset} of a tensor's {length}, "
                f"{int(outside.sum())} lanes: {at}"
            )
        return place

    def _units(self, place: np.ndarray, size: int, thread: np.ndarray):
        count = max(size // self.UNIT, 1)
        return (place[:, None] // self.UNIT + np.arange(count)).ravel(), np.repeat(thread, count)

    def load(self, address: np.ndarray, size: int, thread: np.ndarray, at: str) -> np.ndarray:
        place = self._place(address, size, at)
        unit, who = self._units(place, size, thread)
        writer, reader = self.writer[unit], self.reader[unit]
        if (foreign := self._apart(writer, self.stored[unit], who)).any():
            self.findings.add(
                "loads from global memory what another thread stored in this launch",
                at,
                foreign.sum(),
            )
        self.reader[unit] = self._joined(reader, who)
        self.loaded[unit] = self.interval[who // self.threads]
        return self.views[size][place // size]

    def store(
        self, address: np.ndarray, value: np.ndarray, size: int, thread: np.ndarray, at: str
    ) -> None:
        place = self._place(address, size, at)
        index = place // size
        before = self.views[size][index]
        self.views[size][index] = value
        changed = _differ(before, value)
        if (lost := _differ(after := self.views[size][index], value)).any():
            self.findings.conflict(
                "two lanes store different values to one place of global memory",
                at,
                after[lost],
                value[lost],
            )
        unit, who = self._units(place, size, thread)
        copies = len(unit) // len(place)
        changed_units = np.repeat(changed, copies)
        writer, reader = self.writer[unit], self.reader[unit]
        foreign = (
            (self._apart(writer, self.stored[unit], who) & changed_units).reshape(-1, copies).any(1)
        )
        if foreign.any():
            self.findings.conflict(
                "overwrites in global memory what another thread stored in this launch",
                at,
                before[foreign],
                value[foreign],
            )
        foreign = self._apart(reader, self.loaded[unit], who) & changed_units
        if foreign.any():
            self.findings.add(
                "overwrites in global memory what another thread loaded in this launch",
                at,
                foreign.sum(),
            )
        self.writer[unit] = who
        self.stored[unit] = self.interval[who // self.threads]

    def atomic_add(
        self, address: np.ndarray, value: np.ndarray, thread: np.ndarray, orders: bool, at: str
    ) -> np.ndarray:
        """Add, thread after thread; each acquires what those before it released, if that orders."""
        place = self._place(address, 4, at)
        old = np.empty(len(place), np.uint32)
        for i, (where, who) in enumerate(zip(place, thread)):
            old[i] = self.load(address[i : i + 1], 4, thread[i : i + 1], at)[0]
            self.views[4][where // 4] += value[i]
            if orders:
                block = who // self.threads
                behind = self.behind[block]
                before = self.released.get(where, behind)
                self.acquired[block] = np.maximum(self.acquired.get(block, behind), before)
                self.released[where] = np.maximum(before, behind)
        return old


def _host(start: int, end: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * (end - start)).from_address(start), np.uint8)


class Shared:
    """The shared memory of several blocks, one behind the other.

    Between two barriers of a block, no warp may load what another stored, nor store what another
    loaded or stored. The target of a cp.async belongs to nobody until the issuing thread has waited
    for its group; its warp then counts as the one that stored it.
    """

    def __init__(self, size: int, blocks: int, warps: int, unit: int, findings: Findings) -> None:
        self.size = -(-max(size, 1) // 16) * 16
        self.limit, self.unit, self.findings = size, unit, findings
        self.data = np.full(self.size * blocks, 0xFF, np.uint8)  # NaN, in every floating type
        self.views = {n: self.data.view(SCALAR[n]) for n in SCALAR}
        units = self.size // unit
        self.units = units
        self.writer = np.full(units * blocks, NOBODY, np.int16)
        self.read = np.zeros((warps, units * blocks), bool)
        self.fetches: list[list[np.ndarray]] = []  # lane, its group, units, destination, data
        self.proxy = None  # proxy.AsyncProxy, of kernels with asynchronous products

    def barrier(self, block: int) -> None:
        mine = slice(block * self.units, (block + 1) * self.units)
        np.minimum(self.writer[mine], NOBODY, out=self.writer[mine])
        self.read[:, mine] = False
        if self.proxy is not None:
            self.proxy.barrier(block)

    def place(self, address: np.ndarray, base: np.ndarray, size: int, at: str) -> np.ndarray:
        """Check addresses; return them within `data`."""
        address = address.astype(np.int64)
        if (address & (size - 1)).any():
            raise Fault(f"misaligned access of {size} bytes to shared memory: {at}")
        if address.size and (address.min() < 0 or address.max() + size > self.limit):
            raise Fault(
                f"out of bounds of {self.limit} bytes of shared memory: {int(address.min())} to "
                f"{int(address.max())} + {size}: {at}"
            )
        return address + base

    def _units(self, place: np.ndarray, size: int, warp: np.ndarray):
        count = max(size // self.unit, 1)
        unit = place // self.unit
        if count == 1:
            return unit, warp
        return (unit[:, None] + np.arange(count)).ravel(), np.repeat(warp, count)

    def load(self, place: np.ndarray, size: int, warp: np.ndarray, at: str) -> np.ndarray:
        self.note_read(place, size, warp, at)
        return self.views[size][place // size]

    def note_read(self, place: np.ndarray, size: int, warp: np.ndarray, at: str) -> None:
        unit, warp = self._units(place, size, warp)
        writer = self.writer[unit]
        foreign = (writer != NOBODY) & (writer != warp)
        if foreign.any():
            waiting = (writer[foreign] == PENDING).sum()
            if waiting:
                self.findings.add("loads what cp.async may still be fetching", at, waiting)
            if waiting < foreign.sum():
                self.findings.add(
                    "race: loads what another warp stored since the barrier",
                    at,
                    foreign.sum() - waiting,
                )
        self.read[warp, unit] = True

    def store(
        self, place: np.ndarray, value: np.ndarray, size: int, warp: np.ndarray, at: str
    ) -> None:
        index = place // size
        before = self.views[size][index]
        self.views[size][index] = value
        self._note_write(place, size, warp, at, _differ(before, value), before, value)
        if (lost := _differ(after := self.views[size][index], value)).any():
            self.findings.conflict(
                "two lanes store different values to one place of shared memory",
                at,
                after[lost],
                value[lost],
            )

    def _note_write(
        self,
        place: np.ndarray,
        size: int,
        warp: np.ndarray,
        at: str,
        changed=None,
        before=None,
        value=None,
    ) -> None:
        """Note a store. Storing the same value again is harmless: `changed` is false there."""
        if self.proxy is not None:
            self.proxy.wrote(place, warp, at)
        unit, warp = self._units(place, size, warp)
        writer = self.writer[unit]
        if (writer == PENDING).any():
            self.findings.add(
                "overwrites what cp.async may still be fetching", at, (writer == PENDING).sum()
            )
        copies = len(unit) // max(len(place), 1)
        changed = True if changed is None else np.repeat(changed, copies)
        foreign = (writer >= 0) & (writer != warp) & changed
        if foreign.any():
            kind = "race: overwrites what another warp stored since the barrier"
            if before is None:
                self.findings.add(kind, at, foreign.sum())
            else:
                lanes = foreign.reshape(-1, copies).any(1)
                self.findings.conflict(kind, at, before[lanes], value[lanes])
        others = (self.read[:, unit].sum(0) > self.read[warp, unit]) & changed
        if others.any():
            self.findings.add(
                "race: overwrites what another warp loaded since the barrier", at, others.sum()
            )
        self.writer[unit] = warp

    def fetch(
        self,
        place: np.ndarray,
        data: np.ndarray,
        lane: np.ndarray,
        group: np.ndarray,
        warp: np.ndarray,
        at: str,
    ) -> None:
        """Begin a cp.async of data (lanes, bytes), which arrives once its group is waited for."""
        size = data.shape[1]
        self._note_write(place, size, warp, at)
        self.data[place[:, None] + np.arange(size)] = 0xFF
        self.writer[self._units(place, size, warp)[0]] = PENDING
        self.fetches.append([lane, group, warp, place, data])

    def wait(self, lanes: np.ndarray, done: np.ndarray) -> None:
        """Let arrive what these lanes (a mask over all) issued in groups before done[lane]."""
        kept = []
        for fetch in self.fetches:
            lane, group, warp, place, data = fetch
            now = lanes[lane] & (group < done[lane])
            if now.any():
                size = data.shape[1]
                self.data[place[now][:, None] + np.arange(size)] = data[now]
                unit, owner = self._units(place[now], size, warp[now])
                self.writer[unit] = owner
                if self.proxy is not None:
                    self.proxy.arrived(place[now], warp[now])
            if not now.all():
                kept.append([part[~now] for part in fetch])
        self.fetches = kept
