"""Tensor memory of sm_100, with a shadow that knows who touched what, and groups of products.

A block has 512 columns of 128 lanes of 32 bits. An address has the lane in its upper half, the
column in its lower one. The shadow tells apart columns of bands of 16 lanes, which no access cuts.
Places in it are tuples of arrays: block, band, column.
"""

from __future__ import annotations

import numpy as np

from .memory import NOBODY, Fault, Findings

LANES, COLUMNS, BAND = 128, 512, 16
UNDEFINED = np.uint32(0xFFF7DEAD)  # a NaN: what was never written, or is not there yet


class TensorMemory:
    def __init__(
        self, blocks: int, warps: int, groups: Groups, findings: Findings, first: int
    ) -> None:
        """Begin allocations at `first`, as if other blocks had the columns before."""
        self.groups, self.findings, self.first = groups, findings, first
        self.data = np.full((blocks * LANES, COLUMNS), UNDEFINED)
        self.allocated = np.zeros((blocks, COLUMNS), bool)
        self.allocations: list[dict[int, int]] = [
            {} for _ in range(blocks)
        ]  # first column -> columns
        self.relinquished = [False] * blocks
        shape = (blocks, LANES // BAND, COLUMNS)
        self.writer = np.full(shape, NOBODY, np.int16)  # the warp that stored since the barrier
        self.read = np.zeros((warps, *shape), bool)  # by which warps since the barrier
        self.loading = np.zeros((warps, *shape), bool)  # by tcgen05.ld, not waited for
        self.storing = np.zeros((warps, *shape), bool)  # by tcgen05.st, not waited for
        self.made_by = np.zeros(shape, np.int32)  # the last group of tcgen05.mma that writes it
        self.used_by = np.zeros(shape, np.int32)  # the last one that reads it

    # Allocation

    def allocate(self, block: int, columns: int, at: str) -> int:
        if columns not in (32, 64, 128, 256, 512):
            raise Fault(f"allocates {columns} columns: {at}")
        if self.relinquished[block]:
            raise Fault(f"allocates after relinquish_alloc_permit: {at}")
        for start in (self.first // columns * columns, *range(0, COLUMNS, columns)):
            mine = self.allocated[block, start : start + columns]
            if not mine.any():
                mine[:] = True
                self.allocations[block][start] = columns
                return start
        raise Fault(f"waits forever for {columns} columns of tensor memory: {at}")

    def free(self, block: int, address: int, columns: int, at: str) -> None:
        if self.allocations[block].pop(address, 0) != columns:
            raise Fault(f"no {columns} columns were allocated at {address:#x}: {at}")
        mine = (block, slice(None), slice(address, address + columns))
        running = ~self.groups.known[self.made_by[mine]].any(-1)
        self._report("frees what tcgen05.mma may still be writing", at, running)
        self._report(
            "frees what tcgen05.ld may still be loading", at, self.loading[(slice(None), *mine)]
        )
        self.allocated[block, address : address + columns] = False

    def finish(self) -> None:
        if left := sum(map(len, self.allocations)):
            self.findings.add("tensor memory never freed", "the end", left)

    def check(self, place, at: str) -> None:
        """Raise where an access is not to the block's own columns."""
        block, band, column = place
        if not block.size:
            return
        if column.min() < 0 or column.max() >= COLUMNS or band.max() >= LANES // BAND:
            raise Fault(f"outside of tensor memory: {at}")
        if not self.allocated[block, column].all():
            raise Fault(f"tensor memory that is not allocated: {at}")

    # Order

    def barrier(self, block: int) -> None:
        self.writer[block][~self.storing[:, block].any(0)] = NOBODY
        self.read[:, block] = self.loading[:, block]

    def load(self, place, warp, at: str) -> np.ndarray:
        """Note a tcgen05.ld; return where there is nothing yet that this warp may load."""
        self._see(place, warp, "loads", at)
        early = self.groups.unknown(self.made_by[place], warp)
        self._report("loads what tcgen05.mma may still be writing", at, early)
        self.read[(warp, *place)] = self.loading[(warp, *place)] = True
        return early

    def store(self, place, warp, at: str) -> None:
        """Note a tcgen05.st."""
        writer = self.writer[place]
        self._report(
            "race: overwrites what another warp stored since the barrier",
            at,
            (writer != NOBODY) & (writer != warp),
        )
        self._report(
            "overwrites what tcgen05.mma may still be writing",
            at,
            self.groups.unknown(self.made_by[place], warp),
        )
        self._report(
            "overwrites what tcgen05.mma may still be reading",
            at,
            self.groups.unknown(self.used_by[place], warp),
        )
        self._overwrite(place, warp, at)
        self.writer[place] = warp
        self.storing[(warp, *place)] = True

    def multiply(self, result, operand, accumulates: bool, warp: int, group: int, at: str) -> None:
        """Note a tcgen05.mma; those of one warp follow one another. operand: A's place or None."""
        if operand is not None:
            self._see(operand, warp, "reads", at)
            self.used_by[operand] = group
        if accumulates:
            self._see(result, warp, "adds to", at)
        before = self.made_by[result]
        foreign = self.groups.unknown(before, warp) & (self.groups.warp[before] != warp)
        self._report("overwrites what another warp's tcgen05.mma may still be writing", at, foreign)
        self._overwrite(result, warp, at)
        self._report(
            "overwrites what tcgen05.st may still be storing",
            at,
            self.storing[(slice(None), *result)].any(0),
        )
        self.writer[result] = NOBODY
        self.storing[(slice(None), *result)] = False
        self.made_by[result] = group

    def wait_load(self, warp: np.ndarray, block: np.ndarray) -> None:
        self.loading[warp, block] = False

    def wait_store(self, warp: np.ndarray, block: np.ndarray) -> None:
        self.storing[warp, block] = False

    def _see(self, place, warp, does: str, at: str) -> None:
        writer = self.writer[place]
        self._report(
            f"race: {does} what another warp stored since the barrier",
            at,
            (writer != NOBODY) & (writer != warp),
        )
        self._report(
            f"{does} what tcgen05.st may still be storing", at, self.storing[(warp, *place)]
        )

    def _overwrite(self, place, warp, at: str) -> None:
        others = self.read[(slice(None), *place)].sum(0) > self.read[(warp, *place)]
        self._report("race: overwrites what another warp loaded since the barrier", at, others)
        self._report(
            "overwrites what tcgen05.ld may still be loading",
            at,
            self.loading[(slice(None), *place)].any(0),
        )

    def _report(self, kind: str, at: str, where: np.ndarray) -> None:
        if where.any():
            self.findings.add(f"tensor memory: {kind}", at, where.sum())


class Groups:
    """Groups of asynchronous operations, and which warps know them to be complete.

    An operation belongs to the group that its thread next commits; its warp stands for the thread.
    A warp knows a group to be complete once it has waited for the mbarrier at which it arrived. At
    a barrier all warps of a block learn what one of them knows. Group 0 is that of no operation.
    """

    def __init__(self, warps: int) -> None:
        self.known = np.zeros((64, warps), bool)  # group, warp of its block
        self.known[0] = True
        self.warp = np.full(64, NOBODY, np.int16)  # which issues it
        self.before = [0]  # the group of the same warp before it
        self.last: dict[tuple[int, int], int] = {}  # block, warp -> its newest group
        self.open: set[int] = set()
        self.live: dict[
            int, list[int]
        ] = {}  # block -> groups that some of its warps do not know to be complete

    def current(self, block: int, warp: int) -> int:
        """Return the group of what this warp issues now."""
        newest = self.last.get((block, warp), 0)
        if newest in self.open:
            return newest
        group = len(self.before)
        if group == len(self.known):
            self.known = np.concatenate([self.known, np.zeros_like(self.known)])
            self.warp = np.concatenate([self.warp, self.warp])
        self.warp[group] = warp
        self.before.append(newest)
        self.last[block, warp] = group
        self.open.add(group)
        self.live.setdefault(block, []).append(group)
        return group

    def commit(self, block: int, warp: int) -> int:
        """Return the group that is complete when all is that this warp has issued."""
        group = self.last.get((block, warp), 0)
        self.open.discard(group)
        return group

    def learn(self, group: int, warp: int) -> None:
        while not self.known[group, warp]:
            self.known[group, warp] = True
            group = self.before[group]

    def barrier(self, block: int) -> None:
        if live := self.live.get(block):
            self.known[live] |= self.known[live].any(1)[:, None]
            self.live[block] = [group for group in live if not self.known[group, 0]]

    def unknown(self, group: np.ndarray, warp) -> np.ndarray:
        return ~self.known[group, warp]
