"""mbarriers of sm_90 and sm_100: objects in shared memory that count arrivals and bytes by phases.

A warp that finds its phase unfinished gives way to others, and asks again. Arrivals from outside
(bytes of a copy, the end of an asynchronous product) go through `Mbarriers.post` and happen between
the turns of warps.

Order between warps is known roughly: once a warp has waited for a phase, all warps count as ordered
behind everything that the phase's arrivers did, even after their arrival.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from .memory import NOBODY, Fault
from .parse import Unknown

BYTES = 8
IDLE = 200  # turns in which nothing happens but waiting
SPACES = ("shared", "shared::cta")
SEMANTICS = ("release", "acquire", "relaxed", "cta")


# Translation


def translate(t, words, operands, mask, at) -> list[str]:
    what = [w for w in words[1:-1] if w not in SPACES and w not in SEMANTICS]
    if words[-1] != "b64":
        raise Unknown(".".join(words))
    if what in (["init"], ["inval"], ["expect_tx"], ["complete_tx"]):
        number = t.value(operands[1], "u32") if len(operands) > 1 else 1
        return [f"c.mbarriers.{what[0]}(c, {_address(t, operands[0])}, {number}, {mask}, {at})"]
    if what in (["arrive"], ["arrive", "expect_tx"]):
        number = t.value(operands[2], "u32") if len(operands) > 2 else 1
        lines = [
            f"t, s = c.mbarriers.{'_'.join(what)}"
            f"(c, {_address(t, operands[1])}, {number}, {mask}, {at})"
        ]
        return lines if operands[0] == "_" else [*lines, f"{t.row(operands[0], 'b64')}[s] = t"]
    if what[:1] in (["try_wait"], ["test_wait"]) and what[1:] in ([], ["parity"]):
        by_parity = what[1:] == ["parity"]
        token = t.value(operands[2], "u32" if by_parity else "b64")
        lines = [
            f"t, s = c.mbarriers.over"
            f"(c, {_address(t, operands[1])}, {token}, {by_parity}, {mask}, {at})"
        ]
        return [*lines, f"{t.row(operands[0], 'pred')}[s] = t"]
    raise Unknown(".".join(words))


def arrive_after_copies(t, words, operands, mask, at) -> list[str]:
    """Translate cp.async.mbarrier.arrive."""
    given = f"{_address(t, operands[0])}, {int('noinc' not in words)}, {mask}, {at}"
    return [f"c.mbarriers.arrive_after_copies(c, {given})"]


def _address(t, operand: str) -> str:
    return t.pointer(operand, t.wide_pointer(operand))


def waits(x) -> bool:
    return x.words[0] == "mbarrier" and x.words[1] in ("try_wait", "test_wait")


# Execution


@dataclass
class Mbarrier:
    expected: int
    pending: int
    block: int
    bytes: int = 0  # that are still to come
    phase: int = 0
    arrived: set[int] = field(default_factory=set)  # warps, in this phase
    # Warps in the phase before it, until somebody has waited for that.
    before: set[int] = field(default_factory=set)
    coming: set[int] = field(default_factory=set)  # groups of operations that arrived in this phase
    come: set[int] = field(default_factory=set)  # and in those before it


class Mbarriers:
    """The mbarriers of some blocks, by their place in shared memory."""

    def __init__(self, machine) -> None:
        self.machine, self.shared, self.findings = machine, machine.shared, machine.findings
        self.at: dict[int, Mbarrier] = {}
        self.posted: list = []
        self.changes = self.idle = 0

    # Instructions: c is the context, mask its lanes

    def init(self, c, address, count, mask, at) -> None:
        for lane, place, n in self._each(c, address, count, mask, at):
            if place in self.at:
                self.findings.add("initialises an mbarrier that is one", c._name(at), 1)
            if not 1 <= n < 1 << 20:
                raise Fault(f"an mbarrier for {n} arrivals: {c._name(at)}")
            self.shared._note_write(np.array([place]), BYTES, c.warp[[lane]], c._name(at))
            self.at[place] = Mbarrier(n, n, c.machine_lanes[lane] // self.machine.padded)

    def inval(self, c, address, _, mask, at) -> None:
        for lane, place, _ in self._each(c, address, 0, mask, at):
            self._find(c, lane, place, at)
            self.shared._note_write(np.array([place]), BYTES, c.warp[[lane]], c._name(at))
            del self.at[place]

    def expect_tx(self, c, address, count, mask, at) -> None:
        for lane, place, n in self._each(c, address, count, mask, at):
            self._find(c, lane, place, at).bytes += n

    def complete_tx(self, c, address, count, mask, at) -> None:
        for lane, place, n in self._each(c, address, count, mask, at):
            self._find(c, lane, place, at)
            self.arrives(place, 0, n)

    def arrive(self, c, address, count, mask, at):
        return self._arrive(c, address, count, False, mask, at)

    def arrive_expect_tx(self, c, address, count, mask, at):
        return self._arrive(c, address, count, True, mask, at)

    def arrive_after_copies(self, c, address, more, mask, at) -> None:
        """Arrive when this thread's copies have; the phase then expects `more` arrivals."""
        for lane, place, n in self._each(c, address, more, mask, at):
            self._find(c, lane, place, at).pending += n
            self.post(
                functools.partial(self._copied, c.machine_lanes[lane], place, int(c.warp[lane]))
            )

    def over(self, c, address, token, by_parity, mask, at):
        """Tell whether a phase is over: a token's, or the last one of this parity."""
        lanes = np.arange(c.n) if mask is None else mask.nonzero()[0]
        address, token = (np.broadcast_to(x, c.n)[lanes] for x in (address, token))
        place = self.shared.place(address, c.base[lanes], BYTES, c._name(at))
        asked = np.stack([lanes // 32, place, token.astype(np.int64)])  # by a warp's lanes alike
        changes = (asked[:, 1:] != asked[:, :-1]).any(0).nonzero()[0] + 1
        starts = np.concatenate([[0], changes])[: len(lanes)]
        done = []
        for lane, at_, of in zip(
            lanes[starts].tolist(), place[starts].tolist(), asked[2, starts].tolist()
        ):
            one = self._find(c, lane, at_, at)
            done.append(one.phase & 1 != of & 1 if by_parity else one.phase != of)
            if done[-1]:
                self._order(one)
                for group in one.come:
                    self.machine.tcgen05.groups.learn(group, int(c.warp[lane]))
        return np.repeat(np.array(done, bool), np.diff([*starts, len(lanes)])), lanes

    # What others of the machine do

    def arrives(
        self, place: int, count: int = 1, size: int = 0, warp: int | None = None, group: int = 0
    ) -> None:
        """Count arrivals and expected bytes; group: of tcgen05, which is complete."""
        one = self.at.get(place)
        if one is None:
            raise Fault(f"an arrival at what is no mbarrier: {place}")
        if warp is not None:
            one.arrived.add(warp)
        if group:
            one.coming.add(group)
        if count > one.pending:
            raise Fault(f"more arrivals at an mbarrier than the {one.expected} of a phase")
        one.pending -= count
        one.bytes -= size
        self.changes += 1
        if one.pending == 0 and one.bytes == 0:
            one.phase += 1
            one.pending, one.before, one.arrived = one.expected, one.arrived, set()
            if one.coming:
                one.come = {
                    x for x in one.come if not self.machine.tcgen05.groups.known[x].all()
                } | one.coming
                one.coming = set()

    def post(self, action) -> None:
        """Let an action happen at some time from now on."""
        self.posted.append(action)

    def between_turns(self, moved: bool) -> None:
        """Do some of what was posted; moved: some warp did more than wait for a phase."""
        self.machine.random.shuffle(self.posted)
        while self.posted and (not moved or self.machine.random.random() < 0.5):
            self.posted.pop()()
            moved = True
        self.idle = 0 if moved else self.idle + 1
        if self.idle > IDLE:
            name = self.machine.program.kernel.name
            raise Fault(f"{name} waits for the phase of an mbarrier that never ends")

    # Parts of them

    def _each(self, c, address, number, mask, at):
        lanes = np.arange(c.n) if mask is None else mask.nonzero()[0]
        address, number = (np.broadcast_to(x, c.n)[lanes] for x in (address, number))
        place = self.shared.place(address, c.base[lanes], BYTES, c._name(at))
        return zip(lanes.tolist(), place.tolist(), number.tolist())

    def _find(self, c, lane, place, at) -> Mbarrier:
        if place not in self.at:
            raise Fault(f"no mbarrier there: {c._name(at)}")
        self.shared.note_read(np.array([place]), BYTES, c.warp[[lane]], c._name(at))
        return self.at[place]

    def _arrive(self, c, address, count, expects, mask, at):
        tokens, lanes = [], []
        for lane, place, n in self._each(c, address, count, mask, at):
            one = self._find(c, lane, place, at)
            tokens.append(one.phase)
            lanes.append(lane)
            one.bytes += n if expects else 0
            self.arrives(place, 1 if expects else n, 0, int(c.warp[lane]))
        return np.array(tokens, np.uint64), np.array(lanes, int)

    def _copied(self, lane, place, warp) -> None:
        """Let all arrive that this lane copies."""
        lanes = np.zeros(self.machine.lanes, bool)
        lanes[lane] = True
        self.shared.wait(lanes, self.machine.commits + 1)
        self.arrives(place, 1, 0, warp)

    def _order(self, one: Mbarrier) -> None:
        if one.before:
            shared, warps = self.shared, sorted(one.before)
            mine = slice(one.block * shared.units, (one.block + 1) * shared.units)
            shared.writer[mine][np.isin(shared.writer[mine], warps)] = NOBODY
            shared.read[warps, mine] = False
            one.before = set()
