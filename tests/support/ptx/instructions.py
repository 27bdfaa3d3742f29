"""Translate instructions that compute with a thread's own registers."""

from __future__ import annotations

from .operands import NUMPY, VIEW, Operands, raw_of, sort_of
from .parse import SIZE, Unknown, vector_of

COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
    "hi": ">", "hs": ">=",
}  # fmt: skip


class Arithmetic(Operands):
    """A method `do_NAME` returns the lines of Python for the instruction NAME."""

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
            half = "i16" if type_[0] == "s" else "u16"
            a, b = (
                f"np.broadcast_to({self.value(x, 'b32')}, c.n).copy().view({half})" for x in rest
            )
            return self.put(to, "b32", f"np.{function}({a}, {b}).view(u32)", mask)
        if "ftz" in words:
            a, b = (f"A.flush({self.value(x, type_)})" for x in rest)
            return self.put(to, type_, f"A.flush(np.{function}({a}, {b}))", mask)
        if signless and sort_of(type_) == "s":
            type_ = "u" + type_[1:]
        return self.ufunc(function, to, type_, rest, mask)

    def _packed(self, expression, to, operands, type_, mask):
        """Compute on x, y, z, the halves of the operands, in float64; round once."""
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
            kind = NUMPY[VIEW[sort_of(words[-1]), SIZE[words[-1]]]]
            a, b = (self.value(x, words[-1]) for x in operands[1:])
            return self.put(operands[0], words[-1], f"A.mul_hi({a}, {b}, {kind})", mask)
        return self._binary("multiply", words, operands, mask)

    def do_mad(self, words, operands, mask, at):
        to, a, b, c = operands
        type_ = words[-1]
        if "wide" in words:
            wide = NUMPY[VIEW[sort_of(type_), 2 * SIZE[type_]]]
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
        if words[1:-1] == ["rn", "f32"] and type_ in ("f16", "bf16"):
            return self._fma_mixed(to, rest, type_, mask)
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

    def _fma_mixed(self, to, operands, type_, mask):
        """Multiply two numbers of 16 bits and add to float32, from sm_100 on."""
        *factors, c = operands
        a, b = (f"A.half({self.value(x, 'b16')}, False, {type_ == 'bf16'})" for x in factors)
        masked = "" if mask is None else f", {mask}"
        return [f"A.fma32({a}, {b}, {self.value(c, 'f32')}, {self.row(to, 'f32')}{masked})"]

    def do_div(self, words, operands, mask, at):
        to, a, b = operands
        type_ = words[-1]
        if sort_of(type_) == "f":
            return self._binary("divide", words, operands, mask)
        kind = NUMPY[VIEW[sort_of(type_), SIZE[type_]]]
        return self.put(
            to, type_, f"A.{words[0]}({self.value(a, type_)}, {self.value(b, type_)}, {kind})", mask
        )

    do_rem = do_div

    def _extreme(self, function, words, operands, mask):
        if sort_of(words[-1]) == "f":  # a number beats NaN, unless .NaN
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
            given = f"{self.value(a, f'b{bits}')}, u{bits}({n}), out={self.row(to, f'b{bits}')}"
            return [f"np.left_shift({given}{'' if mask is None else f', where={mask}'})"]
        return self.put(
            to,
            f"b{bits}",
            f"A.shift_left({self.value(a, f'b{bits}')}, {self.value(n, 'u32')}, {bits})",
            mask,
        )

    def do_shr(self, words, operands, mask, at):
        to, a, n = operands
        type_ = words[-1]
        given = f"{self.value(a, type_)}, {self.value(n, 'u32')}"
        call = f"A.shift_right({given}, {8 * SIZE[type_]}, {sort_of(type_) == 's'})"
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
        test = _comparison(words[1], a, b, sort_of(type_) == "f")
        if words[2] in ("and", "or", "xor"):
            other = operands[3]
            value = ("~" if other.startswith("!") else "") + self.value(other.lstrip("!"), "pred")
            test = f"({test} {dict(zip(('and', 'or', 'xor'), '&|^'))[words[2]]} {value})"
        if "|" in operands[0]:
            first, second = operands[0].split("|")
            return [
                f"t = {test}",
                *self.put(first, "pred", "t", mask),
                *self.put(second, "pred", "~t", mask),
            ]
        return self.put(operands[0], "pred", test, mask)

    def _setp_packed(self, words, operands, a, b, mask):
        """Compare lower halves for the first predicate, upper ones for the second."""
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
        sorts = sort_of(target), sort_of(origin)
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
            value = f"A.to_int({value}, {raw_of(target)}, {rounding!r})"
        else:
            value = f"np.asarray({_narrow(value, origin)}).astype({raw_of(target)})"
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
            f"t = np.broadcast_to({self.value(sources[0], 'b32')}, c.n).copy()",
            "t = t.view(np.float16).reshape(-1, 2)",
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


def _narrow(value: str, type_: str) -> str:
    """Take an integer of 8 bits out of its register of 16."""
    return f"np.asarray({value}).astype({raw_of(type_)})" if SIZE[type_] == 1 else value
