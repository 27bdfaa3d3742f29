"""Run a kernel: several blocks at a time, every instruction over all their threads.

Threads that part at a branch go on from the lowest program counter, under a mask, until they meet.
Between two barriers, neighbouring warps take turns in random order, so what a barrier should have
ordered comes out in either order. The shadow of shared memory (memory.py) reports it in both.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import numpy as np

from . import mbarrier, sm_80, sm_100
from .matrices import GROUP
from .memory import SCALAR, Fault, Global, Shared
from .parse import SIZE, Instruction, Kernel
from .proxy import AsyncProxy
from .sm_90 import TensorCores
from .translate import Translator

# A thread waits for the others of its block, or gives way until an mbarrier's phase ends.
RUNNING, WAITING, GIVING_WAY, DONE = range(4)
MOST_STEPS = 2_000_000


class Program:
    """A kernel as blocks of straight code: a function of a context each, and what follows it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        dynamic = -(-kernel.shared_bytes // 16) * 16  # where dynamic shared memory starts
        shared = {name: dynamic if at < 0 else at for name, at in kernel.shared.items()}
        self.dynamic_at = dynamic
        self.translator = Translator(kernel, shared)
        self.unit = self._smallest_shared_access()
        code = kernel.code
        self.uses_tensor_memory = any(x.words[0] == "tcgen05" for x in code)
        leaders = {0} | {kernel.labels[x.operands[-1]] for x in code if x.words[0] == "bra"}
        leaders |= {i + 1 for i, x in enumerate(code) if _ends_block(x)}
        starts = sorted(x for x in leaders if x < len(code))
        number = {start: i for i, start in enumerate(starts)}
        self.bodies, self.next, self.counts = [], [], []
        for start, end in zip(starts, [*starts[1:], len(code)]):
            last = code[end - 1] if _ends_block(code[end - 1]) else None
            self.bodies.append(range(start, end - (last is not None and not mbarrier.waits(last))))
            self.counts.append(Counter(x.opcode for x in code[start:end]))
            self.next.append(self._next(last, number))
        for x in code:
            for name in re.findall(r"%?[\w$.]+", " ".join(x.operands)):
                self.translator.register(name)
        self.registers = dict(self.translator.count)
        self.lockstep = GROUP if self.translator.fragments else 32  # threads that are never apart
        self.compiled: dict[tuple[int, bool], object] = {}

    def block(self, number: int, masked: bool):
        """Compile a block on first use: many never run, and few under a mask."""
        if (number, masked) not in self.compiled:
            self.compiled[number, masked] = self._compile(
                self.bodies[number], "m" if masked else None
            )
        return self.compiled[number, masked]

    def describe(self, at: int) -> str:
        instruction = self.kernel.code[at]
        return f"{self.kernel.name}: `{instruction.text}` (instruction {at}, {instruction.where})"

    def _next(self, last: Instruction | None, number: dict[int, int]):
        """Return what ends a block: (what, next block, predicate row, negated)."""
        if last is None:
            return "next", None, None, False
        if mbarrier.waits(last):
            return "phase", None, self.translator.register(last.operands[0])[1], True
        guard = None if last.guard is None else self.translator.register(last.guard)[1]
        what = {"bra": "bra", "ret": "ret", "exit": "ret"}.get(last.words[0], "bar")
        if what == "bar" and (guard is not None or last.operands != ["0"]):
            raise NotImplementedError(last.text)
        target = number[self.kernel.labels[last.operands[-1]]] if what == "bra" else None
        return what, target, guard, last.negated

    def _compile(self, body: range, mask: str | None):
        lines = ["def block(c, m=None):"]
        for at in body:
            lines += [
                "    " + line for line in self.translator.translate(self.kernel.code[at], mask, at)
            ]
        lines.append("    return")
        space = self.translator.names
        exec(compile("\n".join(lines), f"<{self.kernel.name}>", "exec"), space)
        return space.pop("block")

    def _smallest_shared_access(self) -> int:
        sizes = [16]
        for x in self.kernel.code:
            if x.words[0] in ("ld", "st") and any(w.startswith("shared") for w in x.words):
                vector = next((int(w[1]) for w in x.words if w in ("v2", "v4")), 1)
                sizes.append(SIZE[x.words[-1]] * vector)
            elif x.opcode.startswith("cp.async") and len(x.operands) > 2:
                sizes.append(int(x.operands[2], 0))
            elif x.words[0] == "mbarrier":
                sizes.append(mbarrier.BYTES)
        return min(sizes)


def _ends_block(x: Instruction) -> bool:
    return (
        x.words[0] in ("bra", "ret", "exit", "barrier")
        or (x.words[0] == "bar" and x.words[1] != "warp")
        or mbarrier.waits(x)
    )


class Context:
    """Neighbouring warps: their registers, as lists of rows, and what instructions ask for."""

    def __init__(self, machine: Machine, first: int, last: int) -> None:
        self.machine, self.first = machine, first
        self.n = last - first
        part = slice(first, last)
        for name, file, kind in (
            ("H", "b16", "u2"),
            ("S", "b16", "i2"),
            ("E", "b16", "f2"),
            ("U", "b32", "u4"),
            ("I", "b32", "i4"),
            ("F", "b32", "f4"),
            ("Q", "b64", "u8"),
            ("L", "b64", "i8"),
            ("D", "b64", "f8"),
            ("P", "pred", "?"),
        ):
            setattr(self, name, list(machine.files[file].view(kind)[:, part]))
        self.lanes = np.arange(self.n)
        self.laneid = (self.lanes & 31).astype(np.uint32)
        self.tid = [x[part] for x in machine.tid]
        self.ctaid = [x[part] for x in machine.ctaid]
        self.ntid = [np.uint32(x) for x in machine.block]
        self.nctaid = [np.uint32(x) for x in machine.grid]
        self.warp, self.base, self.thread = (
            machine.warp[part],
            machine.base[part],
            machine.thread[part],
        )
        self.warpid = self.warp.astype(np.uint32)
        self.params = machine.params
        self.machine_lanes = np.arange(first, last)
        self.wgmma, self.tcgen05, self.mbarriers = machine.wgmma, machine.tcgen05, machine.mbarriers
        if self.wgmma is not None:
            self.written = self.wgmma.written[:, first // GROUP : last // GROUP]

    def _some(self, pointer, mask):
        """Return the lanes of a mask, and their pointers."""
        if mask is None:
            return slice(None), np.asarray(pointer)
        lanes = mask.nonzero()[0]
        return lanes, np.broadcast_to(pointer, self.n)[lanes]

    def load_global(self, pointer, size, mask, at):
        lanes, pointer = self._some(pointer, mask)
        if not len(pointer):
            return np.empty(0, SCALAR[size])
        return self.machine.memory.load(pointer, size, self.thread[lanes], self._name(at))

    def store_global(self, pointer, value, size, mask, at):
        lanes, pointer = self._some(pointer, mask)
        if len(pointer):
            value = value.view(SCALAR[size]).ravel()[lanes]
            self.machine.memory.store(pointer, value, size, self.thread[lanes], self._name(at))

    def load_param(self, pointer, size, mask, at):
        _, pointer = self._some(pointer, mask)
        whole = np.frombuffer(self.params + bytes(-len(self.params) % 16), SCALAR[size])
        return whole[pointer.astype(np.int64) // size]

    def load_shared(self, pointer, size, mask, at):
        lanes, pointer = self._some(pointer, mask)
        shared = self.machine.shared
        place = shared.place(pointer, self.base[lanes], size, self._name(at))
        return shared.load(place, size, self.warp[lanes], self._name(at))

    def store_shared(self, pointer, value, size, mask, at):
        lanes, pointer = self._some(pointer, mask)
        shared = self.machine.shared
        place = shared.place(pointer, self.base[lanes], size, self._name(at))
        shared.store(
            place, value.view(SCALAR[size]).ravel()[lanes], size, self.warp[lanes], self._name(at)
        )

    def atomic_add_global(self, pointer, value, mask, at, orders):
        lanes, pointer = self._some(pointer, mask)
        lanes = np.arange(self.n)[lanes]
        value = np.broadcast_to(value, self.n)[lanes]
        old = self.machine.memory.atomic_add(
            pointer, value, self.thread[lanes], orders, self._name(at)
        )
        return old, lanes

    def atomic_add_shared(self, pointer, value, mask, at):
        """Add in shared memory, lane after lane; such accesses do not race with one another."""
        lanes, pointer = self._some(pointer, mask)
        lanes = np.arange(self.n)[lanes]
        shared, values = self.machine.shared, np.broadcast_to(value, self.n)[lanes]
        place = shared.place(pointer, self.base[lanes], 4, self._name(at)) // 4
        old = np.empty(len(lanes), np.uint32)
        for i, (to, more) in enumerate(zip(place, values)):
            old[i] = shared.views[4][to]
            shared.views[4][to] += more
        return old, lanes

    def fetch(self, to, source, size, filled, mask, at):
        lanes, to = self._some(to, mask)
        if not len(to):
            return
        source = np.broadcast_to(source, self.n)[lanes]
        filled = np.broadcast_to(filled, self.n)[lanes]
        data = np.zeros((len(to), size), np.uint8)
        for amount in np.unique(
            filled
        ):  # the rest is zeros; nothing is read where there is nothing to fill
            some = (filled == amount).nonzero()[0]
            if amount == size:
                read = self.machine.memory.load(
                    source[some], size, self.thread[lanes][some], self._name(at)
                )
                data[some] = read.view(np.uint8).reshape(-1, size)
            elif amount:
                for i in range(amount):
                    data[some, i] = self.machine.memory.load(
                        source[some] + i, 1, self.thread[lanes][some], self._name(at)
                    )
        place = self.machine.shared.place(to, self.base[lanes], size, self._name(at))
        lane = self.machine_lanes[lanes]
        self.machine.shared.fetch(
            place, data, lane, self.machine.commits[lane], self.warp[lanes], self._name(at)
        )

    def commit(self, mask):
        self.machine.commits[self.first : self.first + self.n] += 1 if mask is None else mask

    def wait(self, mask, newest, everything):
        lanes = np.zeros(self.machine.lanes, bool)
        lanes[self.first : self.first + self.n] = True if mask is None else mask
        commits = self.machine.commits
        self.machine.shared.wait(
            lanes, np.full_like(commits, 2**31 - 1) if everything else commits - newest
        )

    def fence_proxy(self, mask):
        if (proxy := self.machine.shared.proxy) is not None:
            warps = (
                slice(None, None, 32)
                if mask is None
                else 32 * mask.reshape(-1, 32).any(1).nonzero()[0]
            )
            proxy.fence(self.machine_lanes[warps] // self.machine.padded, self.warp[warps])

    def ldmatrix(self, pointer, count, transposed, mask, at):
        lanes = slice(None) if mask is None else np.repeat(self.whole(mask, at), 32).nonzero()[0]
        pointer = np.broadcast_to(pointer, self.n)[lanes]
        words = sm_80.ldmatrix(
            self.machine.shared,
            pointer,
            self.base[lanes],
            self.warp[lanes],
            count,
            transposed,
            self._name(at),
        )
        return words, lanes

    def stmatrix(self, pointer, registers, transposed, mask, at):
        lanes = slice(None) if mask is None else np.repeat(self.whole(mask, at), 32).nonzero()[0]
        pointer = np.broadcast_to(pointer, self.n)[lanes]
        sm_80.stmatrix(
            self.machine.shared,
            pointer,
            self.base[lanes],
            self.warp[lanes],
            [x[lanes] for x in registers],
            transposed,
            self._name(at),
        )

    def whole(self, mask, at):
        return sm_80.whole_warps(mask, self._name(at))

    def _name(self, at):
        return self.machine.program.describe(at)


class Machine:
    """One launch."""

    def __init__(
        self,
        program: Program,
        grid,
        block,
        params: bytes,
        memory: Global,
        dynamic_shared: int,
        *,
        lanes: int = 2048,
        seed: int = 0,
    ) -> None:
        self.program, self.params, self.memory, self.findings = (
            program,
            params,
            memory,
            memory.findings,
        )
        self.grid, self.block = tuple(grid), tuple(block)
        self.random = random.Random(seed)
        self.executed = np.zeros(len(program.next), np.int64)  # warps, by block of code
        self.threads = block[0] * block[1] * block[2]
        if program.kernel.threads not in (None, self.threads):
            raise Fault(
                f"compiled for {program.kernel.threads} threads, launched with {self.threads}"
            )
        self.padded = -(-self.threads // program.lockstep) * program.lockstep
        self.at_once = max(1, lanes // self.padded)
        memory.launched(self.padded, self.grid[0] * self.grid[1] * self.grid[2])
        self.shared_bytes = program.dynamic_at + dynamic_shared
        self.steps = 0

    def run(self) -> None:
        blocks = list(itertools.product(*(range(n) for n in reversed(self.grid))))  # x fastest
        rounds = -(-len(blocks) // self.at_once)
        with np.errstate(all="ignore"):
            for i in range(rounds):
                # Strided, so that a round holds like tiles of several heads, which go the same way.
                self._run([(n, blocks[n][::-1]) for n in range(i, len(blocks), rounds)])

    def instructions(self) -> Counter:
        """Count how often warps executed each opcode."""
        total: Counter = Counter()
        for executed, counts in zip(self.executed.tolist(), self.program.counts):
            if executed:
                total.update({opcode: n * executed for opcode, n in counts.items()})
        return total

    def _run(self, blocks: list[tuple[int, tuple[int, int, int]]]) -> None:
        self._start(blocks)
        while (self.status != DONE).any():
            before = self.mbarriers.changes, (self.status == DONE).sum()
            for first, last in self._turns():
                self._run_group(self._context(first, last))
            moved = before != (self.mbarriers.changes, (self.status == DONE).sum())
            for block in range(len(blocks)):
                status = self.status[block * self.padded : (block + 1) * self.padded]
                if (status == WAITING).any() and not (
                    status == GIVING_WAY
                ).any():  # all wait or are done
                    self.shared.barrier(block)
                    if self.tcgen05 is not None:
                        self.tcgen05.barrier(block)
                    self.memory.barrier(blocks[block][0])
                    status[status == WAITING] = RUNNING
                    moved = True
            if (self.status == GIVING_WAY).any():
                self.status[self.status == GIVING_WAY] = RUNNING
                self.mbarriers.between_turns(moved)
        if self.tcgen05 is not None:
            self.tcgen05.memory.finish()
        if self.wgmma is not None and self.wgmma.flying:
            self.findings.add(
                "ends before wgmma.wait_group", self.program.kernel.name, self.wgmma.flying
            )

    def _start(self, blocks) -> None:
        self.lanes = self.padded * len(blocks)
        thread = np.tile(np.arange(self.padded), len(blocks))
        which = np.repeat(np.arange(len(blocks)), self.padded)
        x, y, _ = self.block
        self.tid = [n.astype(np.uint32) for n in (thread % x, thread // x % y, thread // (x * y))]
        self.ctaid = [
            np.array([at[axis] for _, at in blocks], np.uint32)[which] for axis in range(3)
        ]
        self.warp = (thread // 32).astype(np.int16)
        self.thread = (np.array([n for n, _ in blocks])[which] * self.padded + thread).astype(
            np.int32
        )
        self.shared = Shared(
            self.shared_bytes, len(blocks), self.padded // 32, self.program.unit, self.findings
        )
        self.base = which * self.shared.size
        # What was never written reads as NaN, or as an address or index far out of bounds.
        self.files = {
            name: np.full((max(n, 1), self.lanes), *fill)
            for (name, n), fill in zip(
                self.program.registers.items(),
                ((True, bool), (0xFFF7, "u2"), (0xFFF7DEAD, "u4"), (0xFFF7DEADFFF7DEAD, "u8")),
            )
        }
        self.pc = np.zeros(self.lanes, np.int32)
        self.status = np.where(thread < self.threads, RUNNING, DONE).astype(np.int8)
        self.commits = np.zeros(self.lanes, np.int64)
        self.mbarriers = mbarrier.Mbarriers(self)
        self.wgmma = self.tcgen05 = None
        if self.program.translator.fragments or self.program.uses_tensor_memory:
            self.shared.proxy = AsyncProxy(self.shared, len(blocks), self.padded // 32)
        if self.program.translator.fragments:
            self.wgmma = TensorCores(self)
        if self.program.uses_tensor_memory:
            self.tcgen05 = sm_100.Unit(self)
        self.contexts: dict[tuple[int, int], Context] = {}
        # Where turns may change: few places, as contexts take time to build.
        lockstep = self.program.lockstep
        runs = self.lanes // lockstep
        self.cuts = [lockstep * self.random.randrange(1, runs) for _ in range(5 if runs > 1 else 0)]

    def _turns(self) -> list[tuple[int, int]]:
        cuts = []
        if self.cuts:
            cuts = self.random.sample(self.cuts, self.random.choice((1, 1, 2, 3)))
        cuts = sorted({0, self.lanes, *cuts})
        turns = list(itertools.pairwise(cuts))
        self.random.shuffle(turns)
        return turns

    def _context(self, first: int, last: int) -> Context:
        if (first, last) not in self.contexts:
            self.contexts[first, last] = Context(self, first, last)
        return self.contexts[first, last]

    def _run_group(self, c: Context) -> None:
        """Run these warps up to a barrier, or the end."""
        program, lanes = self.program, slice(c.first, c.first + c.n)
        pc, status = self.pc[lanes], self.status[lanes]
        while True:
            running = status == RUNNING
            if not running.any():
                return
            block = int(pc[running].min())
            mask = running & (pc == block)
            together = bool(mask.all())
            while True:  # as long as these lanes stay together and meet no others
                self.steps += 1
                if self.steps > MOST_STEPS:
                    raise Fault(f"{program.kernel.name} does not end")
                if together:
                    program.block(block, False)(c)
                    self.executed[block] += c.n // 32
                else:
                    program.block(block, True)(c, mask)
                    self.executed[block] += int(mask.reshape(-1, 32).any(1).sum())
                what, target, guard, negated = program.next[block]
                if what == "next":
                    block += 1
                elif what == "bar":
                    pc[mask], status[mask] = block + 1, WAITING
                    break
                elif what == "phase":
                    late = (mask & ~c.P[guard]).reshape(-1, program.lockstep).any(1)
                    if late.any():
                        pc[mask] = block + 1
                        status[running & np.repeat(late, program.lockstep)] = GIVING_WAY
                        break
                    block += 1
                else:
                    taken = mask
                    if guard is not None:
                        taken = mask & (~c.P[guard] if negated else c.P[guard])
                    count = int(taken.sum())
                    if count == 0:
                        block += 1
                    elif what == "ret":
                        status[taken] = DONE
                        pc[mask & ~taken] = block + 1
                        break
                    elif guard is None or count == int(mask.sum()):
                        block = target
                    else:
                        pc[mask] = block + 1
                        pc[taken] = target
                        break
                if not together:
                    pc[mask] = block
                    others = pc[running & ~mask]
                    if len(others) and block >= others.min():
                        break
