"""Translate PTX instructions to lines of Python, for all lanes at once.

Registers are rows over lanes: `c.U[3]` is 32-bit register 3 as uint32, `c.F[3]` the same bits as
float32, and so on. Under a mask everything is computed and only its lanes are stored; memory is
touched by its lanes alone. Here are memory and what threads do together; `instructions` has what
one computes, and `sm_80`, `sm_90`, `sm_100` and `mbarrier` have families of their own.
"""

from __future__ import annotations

import numpy as np

from . import arithmetic, mbarrier, sm_80, sm_90, sm_100
from .instructions import COMPARE, Arithmetic
from .operands import NUMPY, VIEW, bits_of, raw_of, sort_of
from .parse import SIZE, Instruction, Kernel, Unknown, vector_of

SPACES = ("global", "shared", "param", "local", "const")
# What is known, here or there: an unknown modifier may change what an instruction does.
MODIFIERS = {
    *SIZE, *COMPARE, *SPACES,
    "neu", "equ", "ltu", "leu", "gtu", "geu", "num", "nan", "and", "or", "xor", "wide", "rn", "rni",
    "rzi", "rmi", "rpi", "rna", "ftz", "full", "approx", "NaN", "relu", "to", "v2", "v4", "nc",
    "volatile", "relaxed", "cta", "gpu", "sys", "weak", "ca", "cg", "cs", "lu", "cv", "wb", "wt",
    "async", "commit_group", "wait_group", "wait_all", "sync", "aligned", "m8n8", "x1", "x2", "x4",
    "trans", "m16n8k16", "m16n8k8", "row", "col", "bfly", "idx", "up", "down", "ballot", "any",
    "all", "warp", "add", "min", "max", "l", "r", "wrap", "clamp", "L1::evict_last",
    "L1::evict_first", "L1::evict_normal", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B",
    "proxy", "acq_rel", "sc", "launch_dependents", "wait", "f32x2", "e4m3x2", "e5m2x2", "satfinite",
    "shared::cta", "shared::cluster", "mbarrier_init", "mbarrier", "arrive", "noinc", "release",
    "acquire", "cluster", "inc", "dec",
}  # fmt: skip
# What an atomic may say of its order and scope, by space.
ATOMICS = {"global": (["gpu", "acq_rel"], ["gpu", "relaxed"]), "shared": ([],)}
# With a second type, these would mix float32 and 16 bits.
ONE_TYPE = ("add", "sub", "mul", "mad", "div", "rem", "neg", "abs", "min", "max", "selp")
# Families that check their modifiers themselves.
FAMILIES = {"wgmma": sm_90.translate, "mbarrier": mbarrier.translate, "tcgen05": sm_100.translate}


class Translator(Arithmetic):
    """Translate one kernel."""

    def __init__(self, kernel: Kernel, shared: dict[str, int]) -> None:
        super().__init__(kernel, shared)
        self.names |= {
            "np": np,
            "A": arithmetic,
            "M": sm_80,
            "copyto": np.copyto,
            "where": np.where,
        }
        self.fragments = sm_90.fragments(kernel.code)

    def translate(self, instruction: Instruction, mask: str | None, at: int) -> list[str]:
        """Return lines that run it on the lanes of `mask` (None: all); `at` names it."""
        lines = []
        if instruction.guard is not None:
            guard = ("~" if instruction.negated else "") + self.row(instruction.guard, "pred")
            lines.append(f"w = {guard}" if mask is None else f"w = {mask} & {guard}")
            mask = "w"
        words = instruction.words
        if words[0] in FAMILIES:
            return lines + FAMILIES[words[0]](self, words, instruction.operands, mask, at)
        if self.fragments:
            lines += sm_90.touches(self, instruction, mask, at)
        method = getattr(self, "do_" + words[0], None)
        if (
            method is None
            or not MODIFIERS.issuperset(words[1:])
            or ("ftz" in words and words[0] in ("setp", "max", "min"))
            or (words[0] in ONE_TYPE and sum(word in SIZE for word in words) > 1)
        ):
            raise Unknown(instruction.text)
        return lines + method(words, instruction.operands, mask, at)

    # Memory

    def do_ld(self, words, operands, mask, at):
        space = next((w for w in words if w in SPACES), None)
        space = "shared" if space is None and any(w.startswith("shared") for w in words) else space
        type_ = words[-1]
        parts = vector_of(operands[0])
        if space == "param":
            base, offset = self.address(operands[1])
            if base not in self.kernel.params:
                return self._ld("param", type_, parts, operands[1], mask, at)
            lines = []
            for i, part in enumerate(parts):
                start = self.kernel.params[base][0] + offset + i * SIZE[type_]
                kind = raw_of(type_)
                lines += self.put(
                    part, bits_of(type_), f"np.frombuffer(c.params, {kind}, 1, {start})[0]", mask
                )
            return lines
        if space not in ("global", "shared"):
            raise Unknown(".".join(words))
        return self._ld(space, type_, parts, operands[1], mask, at)

    def _ld(self, space, type_, parts, address, mask, at):
        total = SIZE[type_] * len(parts)
        pointer = self.pointer(address, space == "global" or self.wide_pointer(address))
        lines = [f"t = c.load_{space}({pointer}, {total}, {mask}, {at})"]
        if len(parts) > 1 or total == 16:
            lines.append(f"t = t.view({raw_of(type_)}).reshape(-1, {len(parts)})")
        else:
            lines.append(f"t = t.view({raw_of(type_)})[:, None]")
        for i, part in enumerate(parts):
            if part == "_":
                continue
            kind = self.kernel.register_class(part)
            row = self.row(part, bits_of(type_) if SIZE[type_] > 1 else "b16")
            if sort_of(type_) == "s" and int(kind[1:]) // 8 > SIZE[type_]:
                row = self.row(part, f"s{kind[1:]}")
            lines.append(
                f"{row}[...] = t[:, {i}]" if mask is None else f"{row}[{mask}] = t[:, {i}]"
            )
        return lines

    def do_st(self, words, operands, mask, at):
        space = next((w for w in words if w in SPACES), None)
        space = "shared" if space is None and any(w.startswith("shared") for w in words) else space
        if space not in ("global", "shared"):
            raise Unknown(".".join(words))
        type_ = words[-1]
        parts = vector_of(operands[1])
        values = [self.value(p, bits_of(type_)) for p in parts]
        if SIZE[type_] == 1:
            values = [f"np.asarray({v}).astype(u8)" for v in values]
        total = SIZE[type_] * len(parts)
        pointer = self.pointer(operands[0], space == "global" or self.wide_pointer(operands[0]))
        return [
            f"t = np.empty((c.n, {len(parts)}), {raw_of(type_)})",
            *(f"t[:, {i}] = {v}" for i, v in enumerate(values)),
            f"c.store_{space}({pointer}, t, {total}, {mask}, {at})",
        ]

    def do_atom(self, words, operands, mask, at):
        _, space, *order = words
        if order[-2:] != ["add", "u32"] or order[:-2] not in ATOMICS.get(space, ()):
            raise Unknown(".".join(words))
        pointer = self.pointer(operands[1], space == "global" or self.wide_pointer(operands[1]))
        more = self.value(operands[2], "u32")
        call = f"c.atomic_add_{space}({pointer}, {more}, {mask}, {at}"
        call += f", {'acq_rel' in order})" if space == "global" else ")"
        kept = [] if operands[0] == "_" else [f"{self.row(operands[0], 'b32')}[s] = t"]
        return [f"t, s = {call}", *kept]

    def do_cp(self, words, operands, mask, at):
        if words[1] != "async":
            raise Unknown(".".join(words))
        if words[2] == "commit_group":
            return [f"c.commit({mask})"]
        if words[2] in ("wait_group", "wait_all"):
            return [f"c.wait({mask}, {operands[0] if operands else 0}, {words[2] == 'wait_all'})"]
        if words[2:4] == ["mbarrier", "arrive"]:
            return mbarrier.arrive_after_copies(self, words, operands, mask, at)
        to, source, size, *rest = operands
        filled = self.value(rest[0], "u32") if rest else size
        to = self.pointer(to, self.wide_pointer(to))
        return [
            f"c.fetch({to}, {self.pointer(source, True)}, {int(size, 0)}, {filled}, {mask}, {at})"
        ]

    def do_ldmatrix(self, *instruction):
        return sm_80.translate_ldmatrix(self, *instruction)

    def do_stmatrix(self, *instruction):
        return sm_80.translate_stmatrix(self, *instruction)

    def do_mma(self, *instruction):
        return sm_80.translate_mma(self, *instruction)

    # Threads together

    def do_shfl(self, words, operands, mask, at):
        to, a, b, c, _ = operands
        lines = [] if mask is None else [f"c.whole({mask}, {at})"]
        values = [self.value(x, "b32") for x in (a, b, c)]
        lines.append(
            f"t, s = A.shuffle({values[0]}, {words[2]!r}, {values[1]}, {values[2]}, c.lanes)"
        )
        names = to.split("|")
        lines += self.put(names[0], "b32", "t", mask)
        return lines + (self.put(names[1], "pred", "s", mask) if len(names) > 1 else [])

    def do_vote(self, words, operands, mask, at):
        source = operands[1]
        value = ("~" if source.startswith("!") else "") + self.value(source.lstrip("!"), "pred")
        lines = [f"s = {value}" if mask is None else f"s = ({value}) & {mask}"]
        if "ballot" in words:
            lines += [
                "t = np.packbits(s.reshape(-1, 32), axis=1, bitorder='little').view(u32)[:, 0]",
                "t = np.repeat(t, 32)",
            ]
            return lines + self.put(operands[0], "b32", "t", mask)
        if "any" in words:
            lines.append("t = np.repeat(s.reshape(-1, 32).any(1), 32)")
        elif "all" in words:
            lines.append(f"t = {'s' if mask is None else f's | ~{mask}'}")
            lines.append("t = np.repeat(t.reshape(-1, 32).all(1), 32)")
        else:
            raise Unknown(".".join(words))
        return lines + self.put(operands[0], "pred", "t", mask)

    def do_redux(self, words, operands, mask, at):
        """Reduce over all lanes of a warp: the mask of lanes is all ones in what we run."""
        type_ = words[-1]
        function = {
            "add": "add",
            "min": "minimum",
            "max": "maximum",
            "and": "bitwise_and",
            "or": "bitwise_or",
            "xor": "bitwise_xor",
        }
        if type_ == "f32" and "NaN" not in words:  # a number beats NaN
            function = {"min": "fmin", "max": "fmax"}
        lines = [] if mask is None else [f"c.whole({mask}, {at})"]
        value = self.value(operands[1], type_)
        lines.append(
            f"t = np.repeat(np.{function[words[2]]}.reduce({value}.reshape(-1, 32), axis=1), 32)"
        )
        return lines + self.put(
            operands[0], type_, f"t.astype({NUMPY[VIEW[sort_of(type_), 4]]})", mask
        )

    def do_fence(self, words, operands, mask, at):
        if words[1:3] == ["proxy", "async"] and words[3:] in (
            [],
            ["shared::cta"],
            ["shared::cluster"],
        ):
            return [f"c.fence_proxy({mask})"]
        return []

    def do_elect(self, words, operands, mask, at):
        """Elect the lowest lane that the membermask names; those must all be here."""
        if words != ["elect", "sync"]:
            raise Unknown(".".join(words))
        lines = [] if mask is None else [f"c.whole({mask}, {at})"]
        lines.append(f"t = A.lowest_bit({self.value(operands[1], 'u32')})")
        to, leads = operands[0].split("|")
        return [
            *lines,
            *self.put(to.strip(), "b32", "t", mask),
            *self.put(leads.strip(), "pred", "c.laneid == t", mask),
        ]

    def do_nop(self, words, operands, mask, at):
        return []  # bar.warp.sync among them: within a warp lanes never run ahead here

    do_bar = do_membar = do_setmaxnreg = do_griddepcontrol = do_prefetch = do_createpolicy = do_nop
