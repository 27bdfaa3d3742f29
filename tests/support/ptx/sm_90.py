"""sm_90: wgmma, the asynchronous products of a warpgroup.

A product is computed when it is issued; its accumulators are NaN until the group that it was
committed to has been waited for.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from .matrices import (
    CHUNK,
    GROUP,
    KINDS,
    ROWS,
    decode,
    from_fragments,
    places,
    rows_from_fragments,
    to_fragments,
)
from .memory import Fault
from .parse import Unknown, vector_of

# Translation


class Product(NamedTuple):
    """What one wgmma.mma_async says."""

    n: int
    kinds: tuple[str, str]  # of A and B
    half: bool  # accumulators are f16
    d: tuple[int, ...]  # 32-bit registers
    a: tuple[int, ...] | None  # None: in shared memory
    negated: bool
    transposed: tuple[bool, bool]  # of A and B: M or N runs fastest, not K


def translate(t, words, operands, mask, at) -> list[str]:
    rest = ["sync", "aligned"]
    if words[1:] in (["fence", *rest], ["commit_group", *rest]):
        return [f"c.wgmma.{words[1].removesuffix('_group')}(c, {mask}, {at})"]
    if words[1:] == ["wait_group", *rest]:
        return [f"c.wgmma.wait(c, {mask}, {at}, {int(operands[0], 0)})"]
    product = _product(t, words, operands)
    name = f"k{len(t.names)}"
    t.names[name] = product
    a = None if product.a else t.value(operands[1], "b64")
    given = f"{a}, {t.value(operands[2], 'b64')}, {t.value(operands[3], 'pred')}"
    return [f"c.wgmma.multiply(c, {mask}, {at}, {name}, {given})"]


def _product(t, words, operands) -> Product:
    shape = (
        re.fullmatch(r"m64n(\d+)k(\d+)", words[4])
        if words[1:4] == ["mma_async", "sync", "aligned"]
        else None
    )
    if not shape or len(words) != 8 or words[5] not in ("f32", "f16") or {*words[6:]} - {*KINDS}:
        raise Unknown(".".join(words))
    n, k, half = int(shape[1]), int(shape[2]), words[5] == "f16"
    d, a = (
        [t.register(x)[1] for x in vector_of(some)] if some.startswith("{") else None
        for some in operands[:2]
    )
    signs, transposed = ([int(x, 0) for x in some] for some in (operands[4:6], operands[6:]))
    if a and transposed:  # what is in registers has one order alone
        transposed = [0, *transposed]
    if (
        any(KINDS[x] != k for x in words[6:])
        or n % 8
        or not 8 <= n <= 256
        or len(d) != n // (4 if half else 2)
        or len(a or range(4)) != 4
        or len(signs) != 2
        or len(transposed) != (2 if k == 16 else 0)
    ):
        raise Unknown(".".join(words))
    transposed = tuple(map(bool, transposed or (0, 0)))
    return Product(
        n, tuple(words[6:]), half, tuple(d), a and tuple(a), signs[0] != signs[1], transposed
    )


def fragments(code) -> set[str]:
    """Find the registers that some product of a kernel reads or writes."""
    found = set()
    for x in code:
        if x.opcode.startswith("wgmma.mma_async"):
            for operand in x.operands[:2]:
                found.update(re.findall(r"%?[\w$.]+", operand) if operand.startswith("{") else ())
    return found


def touches(t, instruction, mask, at) -> list[str]:
    """Translate the check of another instruction that has such registers as operands."""
    named = [re.findall(r"%?[\w$.]+", x) for x in instruction.operands]
    stores = instruction.words[0] in ("st", "stmatrix", "red", "cp", "bar")
    written = [] if stores or not named else [x for x in named[0] if x in t.fragments]
    read = [x for some in (named if stores else named[1:]) for x in some if x in t.fragments]
    lines = []
    if written or read:
        index = [[t.register(x)[1] for x in some] for some in (read, written)]
        lines.append(f"if c.wgmma.flying: c.wgmma.touch(c, {mask}, {at}, {index[0]}, {index[1]})")
    some = "" if mask is None else f"{mask}.reshape(-1, {GROUP}).any(1)"
    return lines + [
        f"c.written[{t.register(x)[1]}] {'|= ' + some if some else '= True'}" for x in written
    ]


POISON = 0xFFF7DEAD


# Execution


class _Sums:
    """The accumulators of one list of registers, for every warpgroup."""

    def __init__(self, groups: int, n: int) -> None:
        self.values = np.zeros((groups, ROWS, n), np.float32)
        self.busy = np.zeros(groups, bool)
        self.number = np.zeros(groups, np.int64)  # of the wgmma-group of the last product


class TensorCores:
    """The tensor cores of some blocks: products under way."""

    def __init__(self, machine) -> None:
        self.machine, self.shared, self.findings = machine, machine.shared, machine.findings
        groups, registers = machine.lanes // GROUP, machine.program.registers["b32"]
        self.base = machine.base[::GROUP]
        self.in_block = machine.warp[::GROUP] // 4
        self.committed = np.zeros(groups, np.int64)  # wgmma-groups
        self.written = np.zeros((registers, groups), bool)  # written by others since wgmma.fence
        self.adding = np.zeros((registers, groups), bool)  # accumulators of what is under way
        self.taking = np.zeros((registers, groups), np.int16)  # the same for fragments of A
        self.sums: dict[tuple[int, ...], _Sums] = {}
        self.reads: list[list] = []  # groups, their numbers, chunks per group, registers of A
        self.flying = 0  # products that nobody has waited for

    # Instructions: c is the context, mask its lanes

    def fence(self, c, mask, at) -> None:
        self.written[:, self._groups(c, mask, at)] = False

    def commit(self, c, mask, at) -> None:
        self.committed[self._groups(c, mask, at)] += 1

    def wait(self, c, mask, at, newest) -> None:
        done = np.full(len(self.committed), -1)
        groups = self._groups(c, mask, at)
        done[groups] = self.committed[groups] - newest
        for d, sums in self.sums.items():
            if (ready := sums.busy & (sums.number < done)).any():
                self._deliver(c, d, sums, ready.nonzero()[0])
        kept = []
        for one in self.reads:
            group, number, chunk, a = one
            ready = number < done[group]
            if ready.any():
                self._release(group[ready], chunk[ready], a)
            if not ready.all():
                kept.append([group[~ready], number[~ready], chunk[~ready], a])
        self.reads = kept
        self.flying = len(kept)

    def multiply(self, c, mask, at, product, a, b, scale) -> None:
        groups = self._groups(c, mask, at)
        if not len(groups):
            return
        here, name = groups - c.first // GROUP, c._name(at)
        self._check_registers(groups, product, name)
        right, chunks = self._matrix(
            c, b, groups, product.n, product.kinds[1], product.transposed[1], name
        )
        if product.a:
            left = rows_from_fragments(
                np.stack([_row(c, i)[here] for i in product.a]), product.kinds[0]
            )
        else:
            left, more = self._matrix(
                c, a, groups, ROWS, product.kinds[0], product.transposed[0], name
            )
            chunks = np.concatenate([more, chunks], 1)
        sums = self._accumulators(c, product, groups, here, name)
        result = np.matmul(left, right.swapaxes(1, 2))
        if product.negated:
            result = -result
        keep = np.broadcast_to(scale, c.n)[here * GROUP]
        if keep.any():
            result += (
                sums.values[groups]
                if keep.all()
                else np.where(keep[:, None, None], sums.values[groups], 0)
            )
        sums.values[groups] = result.astype(np.float16) if product.half else result
        sums.number[groups] = self.committed[groups]
        self._take(groups, chunks, product, name)

    def touch(self, c, mask, at, read, written) -> None:
        """Check another instruction that has these registers as operands."""
        groups = (
            np.arange(c.n // GROUP) if mask is None else mask.reshape(-1, GROUP).any(1).nonzero()[0]
        )
        groups = groups + c.first // GROUP
        early = self.adding[np.ix_([*read, *written], groups)].sum()
        if early:
            self.findings.add(
                "touches accumulators of wgmma before wgmma.wait_group", c._name(at), early
            )
        early = (self.taking[np.ix_(written, groups)] > 0).sum()
        if early:
            self.findings.add(
                "overwrites fragments of wgmma before wgmma.wait_group", c._name(at), early
            )

    # Parts of them

    def _groups(self, c, mask, at) -> np.ndarray:
        groups = np.arange(c.first // GROUP, (c.first + c.n) // GROUP)
        if mask is None:
            return groups
        by_group = mask.reshape(-1, GROUP)
        every, some = by_group.all(1), by_group.any(1)
        if (every != some).any():
            raise Fault(f"a part of a warpgroup reached {c._name(at)}")
        return groups[every]

    def _check_registers(self, groups, product, name) -> None:
        registers = (*product.d, *(product.a or ()))
        if (late := self.written[np.ix_(registers, groups)]).any():
            self.findings.add("registers were written after wgmma.fence", name, late.sum())
        if product.a and (early := self.adding[np.ix_(product.a, groups)]).any():
            self.findings.add(
                "takes accumulators of wgmma before wgmma.wait_group", name, early.sum()
            )
        if (early := self.taking[np.ix_(product.d, groups)] > 0).any():
            self.findings.add(
                "overwrites fragments of wgmma before wgmma.wait_group", name, early.sum()
            )

    def _accumulators(self, c, product, groups, here, name) -> _Sums:
        """Return the accumulators, from registers unless such a product is under way."""
        d = product.d
        if d not in self.sums:
            self.sums[d] = _Sums(len(self.committed), product.n)
        sums = self.sums[d]
        fresh = ~sums.busy[groups]
        if fresh.any():
            groups, here = groups[fresh], here[fresh]
            if (early := self.adding[np.ix_(d, groups)]).any():
                self.findings.add(
                    "takes accumulators of wgmma before wgmma.wait_group", name, early.sum()
                )
            sums.values[groups] = from_fragments(
                np.stack([_row(c, i)[here] for i in d]), product.half
            )
            for i in d:
                _row(c, i)[here] = POISON
            sums.busy[groups] = True
            self.adding[np.ix_(d, groups)] = True
        return sums

    def _take(self, groups, chunk, product, name) -> None:
        """Begin to read the operands, until they are waited for."""
        self.shared.proxy.reads(chunk, name)
        self.shared.proxy.begin(self.in_block[groups][:, None], chunk)
        if product.a:
            self.taking[np.ix_(product.a, groups)] += 1
        self.reads.append([groups, self.committed[groups], chunk, product.a])
        self.flying = len(self.reads)

    def _release(self, groups, chunk, a) -> None:
        self.shared.proxy.end(np.repeat(self.in_block[groups], chunk.shape[1]), chunk.ravel())
        if a:
            self.taking[np.ix_(a, groups)] -= 1

    def _deliver(self, c, d, sums, groups) -> None:
        here = groups - c.first // GROUP
        everything = len(here) == c.n // GROUP
        for i, values in zip(
            d, to_fragments(sums.values[groups], len(d) * 4 == sums.values.shape[2])
        ):
            row = _row(c, i)
            row[... if everything else here] = values
        sums.busy[groups] = False
        self.adding[np.ix_(d, groups)] = False

    def _matrix(self, c, descriptor, groups, rows, kind, transposed, name):
        """Read a matrix (groups, rows, k) from shared memory; return it and its chunks."""
        by_group = np.broadcast_to(descriptor, c.n).reshape(-1, GROUP)[groups - c.first // GROUP]
        if (by_group != by_group[:, :1]).any():
            raise Fault(f"a warpgroup's threads have different descriptors: {name}")
        place = places(by_group[:, 0].astype(np.int64), rows, transposed)
        if place.max() + CHUNK > self.shared.limit:
            raise Fault(
                f"out of bounds of {self.shared.limit} bytes of shared memory: "
                f"{int(place.max())} + {CHUNK}: {name}"
            )
        chunk = (place + self.base[groups][:, None]) // CHUNK
        values = decode(self.shared.views[CHUNK][chunk], kind)
        if transposed:
            return values.reshape(len(groups), KINDS[kind], rows).swapaxes(1, 2), chunk
        return values.reshape(len(groups), rows, KINDS[kind]), chunk


def _row(c, register):
    """View a register by warpgroups."""
    return c.U[register].reshape(-1, GROUP)
