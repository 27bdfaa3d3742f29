"""From PTX instructions to lines of Python, for all lanes at once.

Registers are rows over lanes: `c.U[3]` is 32-bit register 3 as uint32, `c.F[3]` the same bits as float32, and so on. Under a mask
everything is computed and only its lanes are stored; memory is touched by its lanes alone.
"""

from __future__ import annotations

import re
import struct

import numpy as np

from . import arithmetic, mbarrier, sm_80, sm_90, sm_100
from .parse import SIZE, Instruction, Kernel, Unknown, vector_of

# Views of the register files, by width and type.
VIEW = {
    ("b", 2): "H",
    ("u", 2): "H",
    ("s", 2): "S",
    ("f", 2): "E",
    ("b", 4): "U",
    ("u", 4): "U",
    ("s", 4): "I",
    ("f", 4): "F",
    ("b", 8): "Q",
    ("u", 8): "Q",
    ("s", 8): "L",
    ("f", 8): "D",
}
NUMPY = {
    "H": "u16",
    "S": "i16",
    "E": "f16",
    "U": "u32",
    "I": "i32",
    "F": "f32",
    "Q": "u64",
    "L": "i64",
    "D": "f64",
}
TYPE = {
    name: getattr(np, full)
    for name, full in {
        "u8": "uint8",
        "i8": "int8",
        "u16": "uint16",
        "i16": "int16",
        "f16": "float16",
        "u32": "uint32",
        "i32": "int32",
        "f32": "float32",
        "u64": "uint64",
        "i64": "int64",
        "f64": "float64",
    }.items()
}
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
SPACES = ("global", "shared", "param", "local", "const")


# What is known, here or there. Another modifier may change what an instruction does, so it must not pass unseen.
MODIFIERS = {
    *SIZE,
    *COMPARE,
    *SPACES,
    "neu",
    "equ",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
    "and",
    "or",
    "xor",
    "wide",
    "rn",
    "rni",
    "rzi",
    "rmi",
    "rpi",
    "rna",
    "ftz",
    "full",
    "approx",
    "NaN",
    "relu",
    "to",
    "v2",
    "v4",
    "nc",
    "volatile",
    "relaxed",
    "cta",
    "gpu",
    "sys",
    "weak",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "async",
    "commit_group",
    "wait_group",
    "wait_all",
    "sync",
    "aligned",
    "m8n8",
    "x1",
    "x2",
    "x4",
    "trans",
    "m16n8k16",
    "m16n8k8",
    "row",
    "col",
    "bfly",
    "idx",
    "up",
    "down",
    "ballot",
    "any",
    "all",
    "warp",
    "add",
    "min",
    "max",
    "l",
    "r",
    "wrap",
    "clamp",
    "L1::evict_last",
    "L1::evict_first",
    "L1::evict_normal",
    "L1::no_allocate",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "proxy",
    "acq_rel",
    "sc",
    "launch_dependents",
    "wait",
    "f32x2",
    "e4m3x2",
    "e5m2x2",
    "satfinite",
    "shared::cta",
    "shared::cluster",
    "mbarrier_init",
    "mbarrier",
    "arrive",
    "noinc",
    "release",
    "acquire",
    "cluster",
    "inc",
    "dec",
}


# Families of instructions that have a file of their own: it checks their modifiers, too.
FAMILIES = {"wgmma": sm_90.translate, "mbarrier": mbarrier.translate, "tcgen05": sm_100.translate}


class Translator:
    def __init__(self, kernel: Kernel, shared: dict[str, int]) -> None:
        self.kernel, self.shared = kernel, shared
        self.index: dict[str, int] = {}
        self.count = {"pred": 0, "b16": 0, "b32": 0, "b64": 0}
        self.names: dict[str, object] = {
            **TYPE,
            "np": np,
            "A": arithmetic,
            "M": sm_80,
            "copyto": np.copyto,
            "where": np.where,
        }
        self.fragments = sm_90.fragments(kernel.code)

    # Operands

    def register(self, name: str) -> tuple[str, int] | None:
        kind = self.kernel.register_class(name)
        if kind is None:
            return None
        if name not in self.index:
            self.index[name] = self.count[kind]
            self.count[kind] += 1
        return kind, self.index[name]

    def row(self, name: str, type_: str) -> str:
        """A register as an array of a PTX type of its width, or wider (the low part of it)."""
        kind, index = self.register(name)
        if kind == "pred":
            return f"c.P[{index}]"
        width = int(kind[1:]) // 8
        sort = _sort(type_)
        if sort == "f" and (SIZE[type_] != width or type_ not in ("f16", "f32", "f64")):
            sort = "b"
        return f"c.{VIEW[sort, width]}[{index}]"

    def value(self, text: str, type_: str) -> str:
        if self.register(text) is not None:
            row = self.row(text, type_)
            kind = self.kernel.register_class(text)
            if (
                type_ != "pred" and kind != "pred" and int(kind[1:]) // 8 > SIZE[type_]
            ):  # the low part
                return f"{row}.astype({NUMPY[VIEW[_sort(type_) if _sort(type_) != 'f' else 'b', max(SIZE[type_], 2)]]})"
            return row
        if text in self.shared:
            return f"u32({self.shared[text]})" if SIZE[type_] == 4 else f"u64({self.shared[text]})"
        if text in self.kernel.params:  # its address, in a space of its own
            return f"u{8 * SIZE[type_]}({self.kernel.params[text][0]})"
        if special := re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", text):
            return f"c.{special[1]}[{'xyz'.index(special[2])}]"
        if text in ("%laneid", "%warpid"):
            return f"c.{text[1:]}"
        if float_ := re.fullmatch(r"0[fd]([0-9A-Fa-f]{8,16})", text):
            bits = bytes.fromhex(float_[1])
            number = struct.unpack(">f" if len(bits) == 4 else ">d", bits)[0]
            if _sort(type_) == "f":
                return self.constant(f"f{8 * len(bits)}", number)
            return f"u{8 * len(bits)}({int.from_bytes(bits, 'big')})"
        negative, text = text.startswith("-"), text.lstrip("-")
        try:
            number = int(text.rstrip("U"), 0 if text.startswith("0x") else 10)
        except ValueError:
            raise Unknown(f"operand {text}") from None
        number = -number if negative else number
        if type_ == "pred":
            return f"np.bool_({bool(number)})"
        bits = 8 * max(SIZE[type_], 2)
        number &= 2**bits - 1
        if _sort(type_) == "s" and number >> (bits - 1):
            number -= 2**bits
        return f"{'i' if _sort(type_) == 's' else 'u'}{bits}({number})"

    def constant(self, kind: str, number: float) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = TYPE[kind](number)
        return name

    # Statements

    def translate(self, instruction: Instruction, mask: str | None, at: int) -> list[str]:
        """Lines that run it on the lanes of `mask` (None: all); `at` names it in messages."""
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
        ):
            raise Unknown(instruction.text)
        return lines + method(words, instruction.operands, mask, at)

    def put(self, name: str, type_: str, expression: str, mask: str | None) -> list[str]:
        if name == "_":
            return []
        kind, index = self.register(name)
        row = self.row(name, type_)
        if kind != "pred" and int(kind[1:]) // 8 > SIZE[type_]:  # extends a narrower result
            width = NUMPY[VIEW["s" if _sort(type_) == "s" else "u", int(kind[1:]) // 8]]
            row = self.row(name, "s64" if _sort(type_) == "s" else "u64")
            expression = f"np.asarray({expression}).astype({width})"
        return [
            f"copyto({row}, {expression})"
            if mask is None
            else f"copyto({row}, {expression}, where={mask})"
        ]

    def ufunc(
        self,
        function: str,
        out: str,
        type_: str,
        operands: list[str],
        mask,
        in_type: str | None = None,
    ) -> list[str]:
        """The shortest way: numpy writes the register itself."""
        values = [self.value(x, in_type or type_) for x in operands]
        if not any(v.startswith("c.") and "astype" not in v for v in values):  # of constants alone
            return self.put(out, type_, f"np.{function}({', '.join(values)})", mask)
        dtype = f", dtype={NUMPY[VIEW[_sort(type_), SIZE[type_]]]}" if in_type else ""
        masked = "" if mask is None else f", where={mask}"
        return [f"np.{function}({', '.join(values)}, out={self.row(out, type_)}{masked}{dtype})"]

    def do_mov(self, words, operands, mask, at):
        to, source = operands
        type_ = words[-1]
        if to.startswith("{"):
            parts = vector_of(to)
            width = SIZE[type_] * 8 // len(parts)
            whole = self.value(source, f"b{SIZE[type_] * 8}")
            lines = [f"t = np.array({whole})"]  # a copy: a part may be the source itself
            for i, part in enumerate(parts):
                lines += self.put(part, f"b{width}", f"(t >> {i * width}).astype(u{width})", mask)
            return lines
        if source.startswith("{"):
            parts = vector_of(source)
            width = SIZE[type_] * 8 // len(parts)
            wide = f"u{SIZE[type_] * 8}"
            terms = [
                f"(np.asarray({self.value(p, f'b{width}')}).astype({wide}) << {i * width})"
                for i, p in enumerate(parts)
            ]
            return self.put(to, type_, " | ".join(terms), mask)
        return self.put(to, type_, self.value(source, type_), mask)

    def _binary(self, function, words, operands, mask, signless=True):
        to, *rest = operands
        type_ = words[-1]
        if type_ in ("f16x2", "bf16x2", "bf16", "f16"):
            return self._packed(f"np.{function}(x, y)", to, rest, type_, mask)
        if type_ == "f32x2" and "ftz" not in words:
            a, b = (f"A.pairs({self.value(x, 'b64')}, c.n)" for x in rest)
            return self.put(to, "b64", f"np.{function}({a}, {b}).view(u64)", mask)
        if type_ in ("s16x2", "u16x2"):
            a, b = (
                f"np.broadcast_to({self.value(x, 'b32')}, c.n).copy().view({'i16' if type_[0] == 's' else 'u16'})"
                for x in rest
            )
            return self.put(to, "b32", f"np.{function}({a}, {b}).view(u32)", mask)
        if "ftz" in words:
            a, b = (f"A.flush({self.value(x, type_)})" for x in rest)
            return self.put(to, type_, f"A.flush(np.{function}({a}, {b}))", mask)
        if signless and _sort(type_) == "s":
            type_ = "u" + type_[1:]
        return self.ufunc(function, to, type_, rest, mask)

    def _packed(self, expression, to, operands, type_, mask):
        """x, y, z: the halves of the operands, in float64; rounded once."""
        base = type_.removesuffix("x2")
        shape = ".reshape(-1, 2)" if type_.endswith("x2") else ""
        read = (
            "A.from_bf16({}).astype(f64)" if base == "bf16" else "{}.view(np.float16).astype(f64)"
        )
        lines = []
        for name, operand in zip("xyz", operands):
            value = self.value(operand, f"b{SIZE[type_] * 8}")
            value = f"np.broadcast_to({value}, c.n).copy().view(u16)"
            lines.append(f"{name} = " + read.format(value) + shape)
        lines.append(f"t = A.to_{base}({expression}).ravel().view(u{SIZE[type_] * 8})")
        return lines + self.put(to, f"b{SIZE[type_] * 8}", "t", mask)

    def do_add(self, words, operands, mask, at):
        return self._binary("add", words, operands, mask)

    def do_sub(self, words, operands, mask, at):
        return self._binary("subtract", words, operands, mask)

    def do_mul(self, words, operands, mask, at):
        if "wide" in words:
            return self.ufunc(
                "multiply", operands[0], _wide(words[-1]), operands[1:], mask, words[-1]
            )
        if "hi" in words:
            kind = NUMPY[VIEW[_sort(words[-1]), SIZE[words[-1]]]]
            a, b = (self.value(x, words[-1]) for x in operands[1:])
            return self.put(operands[0], words[-1], f"A.mul_hi({a}, {b}, {kind})", mask)
        return self._binary("multiply", words, operands, mask)

    def do_mad(self, words, operands, mask, at):
        to, a, b, c = operands
        type_ = words[-1]
        if "wide" in words:
            wide = NUMPY[VIEW[_sort(type_), 2 * SIZE[type_]]]
            product = f"np.multiply({self.value(a, type_)}, {self.value(b, type_)}, dtype={wide})"
            return self.put(to, _wide(type_), f"{product} + {self.value(c, _wide(type_))}", mask)
        if "hi" in words:
            raise Unknown("mad.hi")
        type_ = "u" + type_[1:]
        return self.put(
            to,
            type_,
            f"{self.value(a, type_)} * {self.value(b, type_)} + {self.value(c, type_)}",
            mask,
        )

    def do_fma(self, words, operands, mask, at):
        to, *rest = operands
        type_ = words[-1]
        if "relu" in words:
            raise Unknown(".".join(words))
        if type_ == "f32x2" and "ftz" not in words:
            a, b, c = (f"A.pairs({self.value(x, 'b64')}, c.n)" for x in rest)
            lines = ["t = np.empty(2 * c.n, f32)", f"A.fma32({a}, {b}, {c}, t)"]
            return lines + self.put(to, "b64", "t.view(u64)", mask)
        if SIZE[type_] == 2 or type_.endswith("x2"):
            return self._packed("x * y + z", to, rest, type_, mask)
        a, b, c = (self.value(x, type_) for x in rest)
        if type_ == "f64":
            return self.put(to, type_, f"A.fma64({a}, {b}, {c})", mask)
        if "ftz" in words:
            a, b, c = (f"A.flush({x})" for x in (a, b, c))
        masked = "" if mask is None else f", {mask}"
        row = self.row(to, type_)
        lines = [f"A.fma32({a}, {b}, {c}, {row}{masked})"]
        return lines + (self.put(to, type_, f"A.flush({row})", mask) if "ftz" in words else [])

    def do_div(self, words, operands, mask, at):
        to, a, b = operands
        type_ = words[-1]
        if _sort(type_) == "f":
            return self._binary("divide", words, operands, mask)
        kind = NUMPY[VIEW[_sort(type_), SIZE[type_]]]
        return self.put(
            to, type_, f"A.{words[0]}({self.value(a, type_)}, {self.value(b, type_)}, {kind})", mask
        )

    do_rem = do_div

    def _extreme(self, function, words, operands, mask):
        if _sort(words[-1]) == "f":  # a number beats NaN, unless .NaN
            function = function if "NaN" in words else "f" + function[:3]
        if "relu" in words:  # of integers: not below 0
            if words[-1] != "s32":
                raise Unknown(".".join(words))
            a, b = (self.value(x, "s32") for x in operands[1:])
            return self.put(
                operands[0], "s32", f"np.maximum(np.{function}({a}, {b}), i32(0))", mask
            )
        if len(operands) == 4:  # of three numbers, from sm_100 on
            if words[-1] != "f32" or "ftz" in words:
                raise Unknown(".".join(words))
            a, b, c = (self.value(x, "f32") for x in operands[1:])
            return self.put(
                operands[0], "f32", f"np.{function}(np.{function}({a}, {b}), {c})", mask
            )
        return self._binary(function, words, operands, mask, signless=False)

    def do_min(self, words, operands, mask, at):
        return self._extreme("minimum", words, operands, mask)

    def do_max(self, words, operands, mask, at):
        return self._extreme("maximum", words, operands, mask)

    def _unary(self, function, words, operands, mask):
        type_ = words[-1]
        if type_ in ("bf16", "bf16x2", "f16", "f16x2"):
            return self._packed(f"np.{function}(x)", operands[0], operands[1:], type_, mask)
        value = self.value(operands[1], type_)
        if "ftz" in words:
            value = f"A.flush({value})"
        return self.put(operands[0], type_, f"np.{function}({value})", mask)

    def do_copysign(self, words, operands, mask, at):
        sign, value = (self.value(x, words[-1]) for x in operands[1:])
        return self.put(operands[0], words[-1], f"np.copysign({value}, {sign})", mask)

    def do_neg(self, words, operands, mask, at):
        return self._unary("negative", words, operands, mask)

    def do_abs(self, words, operands, mask, at):
        return self._unary("abs", words, operands, mask)

    def do_not(self, words, operands, mask, at):
        return self._unary("invert", words, operands, mask)

    def do_and(self, words, operands, mask, at):
        return self.ufunc("bitwise_and", operands[0], words[-1], operands[1:], mask)

    def do_or(self, words, operands, mask, at):
        return self.ufunc("bitwise_or", operands[0], words[-1], operands[1:], mask)

    def do_xor(self, words, operands, mask, at):
        return self.ufunc("bitwise_xor", operands[0], words[-1], operands[1:], mask)

    def do_shl(self, words, operands, mask, at):
        to, a, n = operands
        bits = SIZE[words[-1]] * 8
        if n.isdigit() and int(n) < bits and self.register(a):
            return [
                f"np.left_shift({self.value(a, f'b{bits}')}, u{bits}({n}), out={self.row(to, f'b{bits}')}"
                + ("" if mask is None else f", where={mask}")
                + ")"
            ]
        return self.put(
            to,
            f"b{bits}",
            f"A.shift_left({self.value(a, f'b{bits}')}, {self.value(n, 'u32')}, {bits})",
            mask,
        )

    def do_shr(self, words, operands, mask, at):
        to, a, n = operands
        type_ = words[-1]
        call = f"A.shift_right({self.value(a, type_)}, {self.value(n, 'u32')}, {SIZE[type_] * 8}, {_sort(type_) == 's'})"
        return self.put(to, type_, call, mask)

    def do_bfe(self, words, operands, mask, at):
        if words[-1][1:] != "32":
            raise Unknown("bfe of 64 bits")
        to, a, *field = operands
        at_, length = (self.value(x, "u32") for x in field)
        return self.put(
            to, "u32", f"A.bfe({self.value(a, 'u32')}, {at_}, {length}, {words[-1] == 's32'})", mask
        )

    def do_bfi(self, words, operands, mask, at):
        if words[-1] != "b32":
            raise Unknown("bfi of 64 bits")
        values = [self.value(x, "u32") for x in operands[1:]]
        return self.put(operands[0], "b32", f"A.bfi({', '.join(values)})", mask)

    def do_prmt(self, words, operands, mask, at):
        if words != ["prmt", "b32"]:
            raise Unknown(".".join(words))
        return self.put(
            operands[0],
            "b32",
            f"A.prmt({', '.join(self.value(x, 'b32') for x in operands[1:])})",
            mask,
        )

    def do_lop3(self, words, operands, mask, at):
        values = [self.value(x, "b32") for x in operands[1:4]]
        return self.put(
            operands[0], "b32", f"A.lop3({', '.join(values)}, {int(operands[4], 0)})", mask
        )

    def do_shf(self, words, operands, mask, at):
        values = [self.value(x, "b32") for x in operands[1:]]
        return self.put(
            operands[0],
            "b32",
            f"A.funnel({', '.join(values)}, {words[1] == 'l'}, {words[2] == 'clamp'})",
            mask,
        )

    def do_popc(self, words, operands, mask, at):
        return self.put(
            operands[0], "u32", f"A.bits_set({self.value(operands[1], words[-1])})", mask
        )

    def do_clz(self, words, operands, mask, at):
        bits = SIZE[words[-1]] * 8
        return self.put(
            operands[0],
            "u32",
            f"A.leading_zeros({self.value(operands[1], words[-1])}, {bits})",
            mask,
        )

    def do_setp(self, words, operands, mask, at):
        type_ = words[-1]
        a, b = (self.value(x, type_) for x in operands[1:3])
        if type_ in ("f16x2", "bf16x2"):
            return self._setp_packed(words, operands, a, b, mask)
        if type_ in ("f16", "bf16"):
            a, b = (f"A.from_bf16({x})" if type_ == "bf16" else x for x in (a, b))
        test = _comparison(words[1], a, b, _sort(type_) == "f")
        if words[2] in ("and", "or", "xor"):
            other = operands[3]
            value = ("~" if other.startswith("!") else "") + self.value(other.lstrip("!"), "pred")
            test = f"({test} {dict(zip(('and', 'or', 'xor'), '&|^'))[words[2]]} {value})"
        if "|" in operands[0]:
            first, second = operands[0].split("|")
            return (
                [f"t = {test}"]
                + self.put(first, "pred", "t", mask)
                + self.put(second, "pred", "~t", mask)
            )
        return self.put(operands[0], "pred", test, mask)

    def _setp_packed(self, words, operands, a, b, mask):
        """The first predicate is of the lower halves, the second of the upper ones."""
        if len(words) != 3 or "|" not in operands[0]:
            raise Unknown(".".join(words))
        lines = []
        for name, upper in (("t", False), ("s", True)):
            x, y = (f"A.half({v}, {upper}, {words[2] == 'bf16x2'})" for v in (a, b))
            lines.append(f"{name} = {_comparison(words[1], x, y, True)}")
        first, second = operands[0].split("|")
        return lines + self.put(first, "pred", "t", mask) + self.put(second, "pred", "s", mask)

    def do_selp(self, words, operands, mask, at):
        to, a, b, p = operands
        type_ = words[-1]
        return self.put(
            to,
            type_,
            f"where({self.value(p, 'pred')}, {self.value(a, type_)}, {self.value(b, type_)})",
            mask,
        )

    def do_cvta(self, words, operands, mask, at):  # spaces are told apart by the instruction here
        return self.put(operands[0], words[-1], self.value(operands[1], words[-1]), mask)

    def do_cvt(self, words, operands, mask, at):
        to, source, *second = operands
        target, origin = words[-2:]
        if {target, origin} & {"e4m3x2", "e5m2x2"} or "satfinite" in words:
            return self._cvt_fp8(words, operands, mask)
        rounding = next((w for w in words if w in ("rni", "rzi", "rmi", "rpi")), None)
        if target in ("bf16x2", "f16x2"):
            if "relu" in words or "rn" not in words:
                raise Unknown(".".join(words))
            high, low = (
                f"A.to_{target[:-2]}({self.value(x, 'f32')}).astype(u32)" for x in (source, *second)
            )
            return self.put(to, "b32", f"({high} << 16) | {low}", mask)
        value = self.value(source, origin)
        if origin in ("bf16", "f16"):
            value = (
                f"A.from_bf16({value})"
                if origin == "bf16"
                else f"np.asarray({value}).view(np.float16)"
            )
        if "ftz" in words and "f32" in (target, origin):
            value = f"A.flush({value})"
        sorts = _sort(target), _sort(origin)
        if target == "tf32":
            value = f"A.to_tf32({value})" if "rna" in words else Unknown.__name__
        elif target in ("bf16", "f16"):
            if "rn" not in words or "relu" in words:
                raise Unknown(".".join(words))
            value = f"A.to_{target}({value})"  # from float64 this would round twice
            target = "b16"
        elif sorts == ("f", "f"):
            if rounding:
                function = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[rounding]
                value = f"np.{function}({value})"
            elif SIZE[target] < SIZE[origin] and "rn" not in words:
                raise Unknown(".".join(words))
            value = f"np.asarray({value}).astype({NUMPY[VIEW['f', SIZE[target]]]})"
        elif sorts[0] == "f":
            if "rn" not in words:
                raise Unknown(".".join(words))
            value = f"np.asarray({_narrow(value, origin)}).astype({NUMPY[VIEW['f', SIZE[target]]]})"
        elif sorts[1] == "f":
            value = f"A.to_int({value}, {_integer(target)}, {rounding!r})"
        else:
            value = f"np.asarray({_narrow(value, origin)}).astype({_integer(target)})"
            if "sat" in words:
                raise Unknown(".".join(words))
        return self.put(to, target, value, mask)

    def _cvt_fp8(self, words, operands, mask):
        to, *sources = operands
        target, origin = words[-2:]
        if words[1:-2] == ["rn"] and target == "f16x2" and origin in ("e4m3x2", "e5m2x2"):
            value = self.value(sources[0], "b16")
            return self.put(
                to, "b32", f"A.unpack_fp8(np.broadcast_to({value}, c.n), {origin[:4]!r})", mask
            )
        if (
            words[1:-2] != ["rn", "satfinite"]
            or target not in ("e4m3x2", "e5m2x2")
            or origin not in ("f32", "f16x2")
        ):
            raise Unknown(".".join(words))
        if origin == "f32":
            high, low = (self.value(x, "f32") for x in sources)
            return self.put(to, "b16", f"A.pack_fp8({high}, {low}, {target[:4]!r})", mask)
        lines = [
            f"t = np.broadcast_to({self.value(sources[0], 'b32')}, c.n).copy().view(np.float16).reshape(-1, 2)"
        ]
        return lines + self.put(to, "b16", f"A.pack_fp8(t[:, 1], t[:, 0], {target[:4]!r})", mask)

    def _approx(self, function, words, operands, mask):
        if words[-1] not in ("f32", "f64"):
            raise Unknown(".".join(words))
        value = self.value(operands[1], words[-1])
        if words[-1] == "f64":
            return self.put(operands[0], "f64", f"{function}({value})", mask)
        return self.put(
            operands[0], "f32", f"A.approx({function}, {value}, {'ftz' in words})", mask
        )

    def do_ex2(self, words, operands, mask, at):
        return self._approx("np.exp2", words, operands, mask)

    def do_lg2(self, words, operands, mask, at):
        return self._approx("np.log2", words, operands, mask)

    def do_rcp(self, words, operands, mask, at):
        return self._approx("A.rcp", words, operands, mask)

    def do_sqrt(self, words, operands, mask, at):
        return self._approx("np.sqrt", words, operands, mask)

    def do_rsqrt(self, words, operands, mask, at):
        return self._approx("A.rsqrt", words, operands, mask)

    def do_sin(self, words, operands, mask, at):
        return self._approx("np.sin", words, operands, mask)

    def do_cos(self, words, operands, mask, at):
        return self._approx("np.cos", words, operands, mask)

    def do_tanh(self, words, operands, mask, at):
        return self._approx("np.tanh", words, operands, mask)

    # Memory

    def _address(self, operand: str) -> tuple[str, int]:
        inner = operand.strip("[] ")
        base, _, offset = inner.partition("+")
        return base.strip(), int(offset, 0) if offset else 0

    def _pointer(self, operand: str, wide: bool) -> str:
        base, offset = self._address(operand)
        if base in self.shared:
            return f"np.full(c.n, {self.shared[base] + offset}, i64)"
        value = f"{self.value(base, 's64' if wide else 'u32')}"
        if not wide:
            value = f"{value}.astype(i64)"
        return f"{value} + {offset}" if offset else value

    def do_ld(self, words, operands, mask, at):
        space = next((w for w in words if w in SPACES), None)
        space = "shared" if space is None and any(w.startswith("shared") for w in words) else space
        type_ = words[-1]
        parts = vector_of(operands[0])
        if space == "param":
            base, offset = self._address(operands[1])
            if base not in self.kernel.params:
                return self._ld("param", type_, parts, operands[1], mask, at)
            lines = []
            for i, part in enumerate(parts):
                start = self.kernel.params[base][0] + offset + i * SIZE[type_]
                kind = _raw(type_)
                lines += self.put(
                    part, _bits(type_), f"np.frombuffer(c.params, {kind}, 1, {start})[0]", mask
                )
            return lines
        if space not in ("global", "shared"):
            raise Unknown(".".join(words))
        return self._ld(space, type_, parts, operands[1], mask, at)

    def _ld(self, space, type_, parts, address, mask, at):
        total = SIZE[type_] * len(parts)
        pointer = self._pointer(address, space == "global" or self._wide_pointer(address))
        lines = [f"t = c.load_{space}({pointer}, {total}, {mask}, {at})"]
        if len(parts) > 1 or total == 16:
            lines.append(f"t = t.view({_raw(type_)}).reshape(-1, {len(parts)})")
        else:
            lines.append(f"t = t.view({_raw(type_)})[:, None]")
        for i, part in enumerate(parts):
            if part == "_":
                continue
            kind = self.kernel.register_class(part)
            row = self.row(part, _bits(type_) if SIZE[type_] > 1 else "b16")
            if _sort(type_) == "s" and int(kind[1:]) // 8 > SIZE[type_]:
                row = self.row(part, f"s{kind[1:]}")
            lines.append(
                f"{row}[...] = t[:, {i}]" if mask is None else f"{row}[{mask}] = t[:, {i}]"
            )
        return lines

    def _wide_pointer(self, operand: str) -> bool:
        register = self.register(self._address(operand)[0])
        return register is not None and register[0] == "b64"

    def do_st(self, words, operands, mask, at):
        space = next((w for w in words if w in SPACES), None)
        space = "shared" if space is None and any(w.startswith("shared") for w in words) else space
        if space not in ("global", "shared"):
            raise Unknown(".".join(words))
        type_ = words[-1]
        parts = vector_of(operands[1])
        values = [self.value(p, _bits(type_)) for p in parts]
        if SIZE[type_] == 1:
            values = [f"np.asarray({v}).astype(u8)" for v in values]
        total = SIZE[type_] * len(parts)
        pointer = self._pointer(operands[0], space == "global" or self._wide_pointer(operands[0]))
        return [
            f"t = np.empty((c.n, {len(parts)}), {_raw(type_)})",
            *(f"t[:, {i}] = {v}" for i, v in enumerate(values)),
            f"c.store_{space}({pointer}, t, {total}, {mask}, {at})",
        ]

    def do_atom(self, words, operands, mask, at):
        if words[1] != "shared" or words[2:] != ["add", "u32"]:
            raise Unknown(".".join(words))
        pointer = self._pointer(operands[1], self._wide_pointer(operands[1]))
        return [
            f"t, s = c.atomic_add({pointer}, {self.value(operands[2], 'u32')}, {mask}, {at})"
        ] + ([] if operands[0] == "_" else [f"{self.row(operands[0], 'b32')}[s] = t"])

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
        to = self._pointer(to, self._wide_pointer(to))
        return [
            f"c.fetch({to}, {self._pointer(source, True)}, {int(size, 0)}, {filled}, {mask}, {at})"
        ]

    def do_ldmatrix(self, words, operands, mask, at):
        if "m8n8" not in words or "b16" not in words:
            raise Unknown(".".join(words))
        parts = vector_of(operands[0])
        pointer = self._pointer(operands[1], self._wide_pointer(operands[1]))
        lines = [f"t, s = c.ldmatrix({pointer}, {len(parts)}, {'trans' in words}, {mask}, {at})"]
        return lines + [f"{self.row(part, 'b32')}[s] = t[{i}]" for i, part in enumerate(parts)]

    def do_stmatrix(self, words, operands, mask, at):
        if "m8n8" not in words or "b16" not in words:
            raise Unknown(".".join(words))
        parts = vector_of(operands[1])
        pointer = self._pointer(operands[0], self._wide_pointer(operands[0]))
        values = ", ".join(self.value(part, "b32") for part in parts)
        return [f"c.stmatrix({pointer}, ({values},), {'trans' in words}, {mask}, {at})"]

    def do_mma(self, words, operands, mask, at):
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
        read = ["(" + ", ".join(self.value(x, "b32") for x in part) + ",)" for part in (a, b)]
        sums = "(" + ", ".join(f"{self.value(x, 'f32')}" for x in c) + ")"
        lines.append(f"t = M.mma({read[0]}, {read[1]}, {sums}, {kinds[1]!r})")
        for i, name in enumerate(d):
            lines += self.put(name, "f32", f"t[{i}]", mask)
        return lines

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
            lines.append(
                "t = np.repeat(np.packbits(s.reshape(-1, 32), axis=1, bitorder='little').view(u32)[:, 0], 32)"
            )
            return lines + self.put(operands[0], "b32", "t", mask)
        if "any" in words:
            lines.append("t = np.repeat(s.reshape(-1, 32).any(1), 32)")
        elif "all" in words:
            lines.append(
                f"t = np.repeat((s{'' if mask is None else f' | ~{mask}'}).reshape(-1, 32).all(1), 32)"
            )
        else:
            raise Unknown(".".join(words))
        return lines + self.put(operands[0], "pred", "t", mask)

    def do_redux(self, words, operands, mask, at):
        """Of all lanes of a warp; the mask of lanes is all ones in what we run."""
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
            operands[0], type_, f"t.astype({NUMPY[VIEW[_sort(type_), 4]]})", mask
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
        """The lowest lane of those that the membermask names, which must all be here."""
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


def _sort(type_: str) -> str:
    return (
        "f"
        if type_ in ("f16", "bf16", "f32", "f64", "tf32", "f16x2", "bf16x2")
        else type_[0]
        if type_ != "pred"
        else "b"
    )


def _comparison(compare: str, a: str, b: str, of_floats: bool) -> str:
    if compare in ("num", "nan"):
        test = f"(np.isnan({a}) | np.isnan({b}))"
        return test if compare == "nan" else f"~{test}"
    if compare == "neu":
        return f"({a} != {b})"
    if compare not in COMPARE:  # unordered: true for NaN
        return f"(({a} {COMPARE[compare[:2]]} {b}) | np.isnan({a}) | np.isnan({b}))"
    test = f"({a} {COMPARE[compare]} {b})"
    if compare == "ne" and of_floats:  # ordered, unlike numpy's
        test = f"({test} & ~np.isnan({a}) & ~np.isnan({b}))"
    return test


def _wide(type_: str) -> str:
    return f"{type_[0]}{2 * int(type_[1:])}"


def _bits(type_: str) -> str:
    return f"{'s' if _sort(type_) == 's' else 'b'}{8 * SIZE[type_]}"


def _raw(type_: str) -> str:
    return f"{'i' if _sort(type_) == 's' else 'u'}{8 * SIZE[type_]}"


def _integer(type_: str) -> str:
    return f"{'i' if _sort(type_) == 's' else 'u'}{8 * SIZE[type_]}"


def _narrow(value: str, type_: str) -> str:
    """An integer of 8 bits sits in a register of 16."""
    return f"np.asarray({value}).astype({_integer(type_)})" if SIZE[type_] == 1 else value
