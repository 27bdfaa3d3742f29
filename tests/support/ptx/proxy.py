"""Shared memory as the asynchronous proxy of sm_90 and sm_100 sees it: wgmma and tcgen05.

Ordinary loads and stores go through the generic proxy. The asynchronous one sees their results only
behind a `fence.proxy.async` of the warp that stored them, or of any warp after a barrier. An
asynchronous operation owns what it reads until it has been waited for. All by chunks of 16 bytes.
"""

from __future__ import annotations

import numpy as np

from .matrices import CHUNK
from .memory import NOBODY, PENDING, SCALAR

# Fenced; stored since the last barrier; stored before it, and no fence since.
SEEN, NEW, OLD = 0, 1, 3


class AsyncProxy:
    def __init__(self, shared, blocks: int, warps: int) -> None:
        self.shared, self.blocks, self.warps = shared, blocks, warps
        chunks = len(shared.data) // CHUNK
        self.chunks = chunks // blocks
        self.unfenced = np.zeros(chunks, np.uint8)
        self.author = np.full(chunks, NOBODY, np.int16)  # the warp that stored last
        self.groups = None  # tensor_memory.Groups, of kernels with tensor memory
        self.reader = np.zeros(chunks, np.int32)  # the last of them that reads
        # Operations under way, by the warpgroup that waits for them.
        self.reading = np.zeros((-(-warps // 4), chunks), np.int16)
        # Shadows of units, a chunk at a time.
        units = SCALAR[CHUNK // shared.unit]
        self.owners = shared.writer.view(
            {1: "<i2", 2: "<i4", 4: "<i8"}.get(CHUNK // shared.unit, "<i8")
        )
        self.owners = self.owners.reshape(chunks, -1)
        self.read = [row.view(units) for row in shared.read]
        self.mark = np.ones(CHUNK // shared.unit, np.uint8).view(units)[0]

    def wrote(self, place: np.ndarray, warp: np.ndarray, at: str) -> None:
        """Note that the generic proxy stored there, or cp.async will."""
        chunk = place // CHUNK
        busy = self.reading[:, chunk].any(0)
        if self.groups is not None:
            busy = busy | self.groups.unknown(self.reader[chunk], warp)
        if busy.any():
            self.shared.findings.add(
                "overwrites what an asynchronous product may still be reading", at, busy.sum()
            )
        self.arrived(place, warp)

    def arrived(self, place: np.ndarray, warp: np.ndarray) -> None:
        chunk = place // CHUNK
        self.unfenced[chunk], self.author[chunk] = NEW, warp

    def barrier(self, block: int) -> None:
        mine = slice(block * self.chunks, (block + 1) * self.chunks)
        self.unfenced[mine] |= self.unfenced[mine] << 1
        self.unfenced[mine] &= OLD

    def fence(self, block: np.ndarray, warp: np.ndarray) -> None:
        """Execute fence.proxy.async of these warps of these blocks."""
        for one in np.unique(block):
            mine, some = slice(one * self.chunks, (one + 1) * self.chunks), warp[block == one]
            if len(some) == self.warps:
                self.unfenced[mine] = SEEN
            else:
                own = np.isin(self.author[mine], some)
                self.unfenced[mine][own | (self.unfenced[mine] == OLD)] = SEEN

    def reads(self, chunk: np.ndarray, at: str, warp: int = NOBODY) -> None:
        """Begin to read there; warp: the only one that the operation is ordered behind."""
        owners = self.owners[chunk]
        if (owners != NOBODY).any():  # each of a chunk's units has a writer
            foreign = (owners.view(np.int16) != NOBODY) & (owners.view(np.int16) != warp)
            waiting = (owners.view(np.int16) == PENDING).sum()
            if waiting:
                self.shared.findings.add("loads what cp.async may still be fetching", at, waiting)
            if foreign.sum() > waiting:
                self.shared.findings.add(
                    "race: loads what a warp stored since the barrier", at, foreign.sum() - waiting
                )
        unfenced = self.unfenced[chunk]
        if unfenced.any():
            self.shared.findings.add(
                "loads without fence.proxy.async what was stored", at, (unfenced != SEEN).sum()
            )

    def begin(self, group: np.ndarray, chunk: np.ndarray) -> None:
        self.reading[group, chunk] += 1

    def end(self, group: np.ndarray, chunk: np.ndarray) -> None:
        """End a read that was waited for, as if each warp of the group had loaded it."""
        self.reading[group, chunk] -= 1
        for warp in range(self.warps):
            mine = chunk if (group == warp // 4).all() else chunk[group == warp // 4]
            self.read[warp][mine] = self.mark
