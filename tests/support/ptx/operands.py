"""Translate operands: registers, constants and addresses as Python expressions."""

from __future__ import annotations

import re
import struct

import numpy as np

from .parse import SIZE, Kernel, Unknown

# Views of the register files, by width and type.
VIEW = {
    ("b", 2): "H", ("u", 2): "H", ("s", 2): "S", ("f", 2): "E",
    ("b", 4): "U", ("u", 4): "U", ("s", 4): "I", ("f", 4): "F",
    ("b", 8): "Q", ("u", 8): "Q", ("s", 8): "L", ("f", 8): "D",
}  # fmt: skip
NUMPY = {
    "H": "u16", "S": "i16", "E": "f16", "U": "u32", "I": "i32", "F": "f32", "Q": "u64", "L": "i64",
    "D": "f64",
}  # fmt: skip
TYPE = {
    "u8": np.uint8, "i8": np.int8, "u16": np.uint16, "i16": np.int16, "f16": np.float16,
    "u32": np.uint32, "i32": np.int32, "f32": np.float32, "u64": np.uint64, "i64": np.int64,
    "f64": np.float64,
}  # fmt: skip


class Operands:
    """The operands of one kernel's instructions."""

    def __init__(self, kernel: Kernel, shared: dict[str, int]) -> None:
        self.kernel, self.shared = kernel, shared
        self.index: dict[str, int] = {}
        self.count = {"pred": 0, "b16": 0, "b32": 0, "b64": 0}
        self.names: dict[str, object] = {**TYPE}  # what the expressions refer to

    def register(self, name: str) -> tuple[str, int] | None:
        kind = self.kernel.register_class(name)
        if kind is None:
            return None
        if name not in self.index:
            self.index[name] = self.count[kind]
            self.count[kind] += 1
        return kind, self.index[name]

    def row(self, name: str, type_: str) -> str:
        """Return a register as an array of a PTX type, as wide as it or wider."""
        kind, index = self.register(name)
        if kind == "pred":
            return f"c.P[{index}]"
        width = int(kind[1:]) // 8
        sort = sort_of(type_)
        if sort == "f" and (SIZE[type_] != width or type_ not in ("f16", "f32", "f64")):
            sort = "b"
        return f"c.{VIEW[sort, width]}[{index}]"

    def value(self, text: str, type_: str) -> str:
        if self.register(text) is not None:
            row = self.row(text, type_)
            kind = self.kernel.register_class(text)
            if "pred" in (type_, kind) or int(kind[1:]) // 8 <= SIZE[type_]:
                return row
            sort = sort_of(type_) if sort_of(type_) != "f" else "b"
            return f"{row}.astype({NUMPY[VIEW[sort, max(SIZE[type_], 2)]]})"  # the low part
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
            if sort_of(type_) == "f":
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
        if sort_of(type_) == "s" and number >> (bits - 1):
            number -= 2**bits
        return f"{'i' if sort_of(type_) == 's' else 'u'}{bits}({number})"

    def constant(self, kind: str, number: float) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = TYPE[kind](number)
        return name

    def put(self, name: str, type_: str, expression: str, mask: str | None) -> list[str]:
        if name == "_":
            return []
        kind, _ = self.register(name)
        row = self.row(name, type_)
        if kind != "pred" and int(kind[1:]) // 8 > SIZE[type_]:  # extends a narrower result
            width = NUMPY[VIEW["s" if sort_of(type_) == "s" else "u", int(kind[1:]) // 8]]
            row = self.row(name, "s64" if sort_of(type_) == "s" else "u64")
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
        """Let numpy write the register itself, which is the shortest way."""
        values = [self.value(x, in_type or type_) for x in operands]
        if not any(v.startswith("c.") and "astype" not in v for v in values):  # of constants alone
            return self.put(out, type_, f"np.{function}({', '.join(values)})", mask)
        dtype = f", dtype={NUMPY[VIEW[sort_of(type_), SIZE[type_]]]}" if in_type else ""
        masked = "" if mask is None else f", where={mask}"
        return [f"np.{function}({', '.join(values)}, out={self.row(out, type_)}{masked}{dtype})"]

    def address(self, operand: str) -> tuple[str, int]:
        inner = operand.strip("[] ")
        base, _, offset = inner.partition("+")
        return base.strip(), int(offset, 0) if offset else 0

    def pointer(self, operand: str, wide: bool) -> str:
        base, offset = self.address(operand)
        if base in self.shared:
            return f"np.full(c.n, {self.shared[base] + offset}, i64)"
        value = f"{self.value(base, 's64' if wide else 'u32')}"
        if not wide:
            value = f"{value}.astype(i64)"
        return f"{value} + {offset}" if offset else value

    def wide_pointer(self, operand: str) -> bool:
        register = self.register(self.address(operand)[0])
        return register is not None and register[0] == "b64"


def sort_of(type_: str) -> str:
    return (
        "f"
        if type_ in ("f16", "bf16", "f32", "f64", "tf32", "f16x2", "bf16x2")
        else type_[0]
        if type_ != "pred"
        else "b"
    )


def bits_of(type_: str) -> str:
    return f"{'s' if sort_of(type_) == 's' else 'b'}{8 * SIZE[type_]}"


def raw_of(type_: str) -> str:
    return f"{'i' if sort_of(type_) == 's' else 'u'}{8 * SIZE[type_]}"
