"""Parse PTX as Triton's LLVM backend writes it; not the whole language."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZE = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f32x2": 8,
    "f16x2": 4,
    "bf16x2": 4,
    "s16x2": 4,
    "u16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


class Unknown(NotImplementedError):
    """An instruction or a modifier is not known here."""


@dataclass
class Instruction:
    opcode: str  # "ld.global.v4.b32"
    operands: list[str]  # "{a, b}" and "[x+4]" stay whole
    guard: str | None = None  # predicate register
    negated: bool = False
    text: str = ""
    where: str = ""  # file:line of the source, from .loc

    @property
    def words(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    name: str
    params: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (offset, bytes)
    param_bytes: int = 0
    # Name or prefix -> class: b16, b32, b64 or pred.
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    # Static symbols -> offset; dynamic ones -> -1.
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0  # static
    threads: int | None = None

    def register_class(self, name: str) -> str | None:
        found = self.registers.get(name)
        return found or self.registers.get(name.rstrip("0123456789") + "<>")


def kernels(text: str) -> dict[str, Kernel]:
    """Parse every .entry of a PTX module."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    text = text.split(".section")[0]  # debug information
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    # .loc has no semicolon; keep it as a statement of its own.
    text = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)[^\n]*", r"@loc \1 \2;", text, flags=re.M)
    text = re.sub(r"^\s*\.(file|version|target|address_size)[^\n]*", "", text, flags=re.M)
    found: dict[str, Kernel] = {}
    outer = Kernel("")  # symbols of the module
    for declaration in re.findall(r"^\s*(?:\.extern\s+)?\.shared[^;]*;", text, re.M):
        _declare_shared(outer, declaration.strip(" ;\n"))
    for head in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, re.S):
        kernel = found[head[1]] = Kernel(
            head[1], shared=dict(outer.shared), shared_bytes=outer.shared_bytes
        )
        for param in head[2].split(","):
            if param.strip():
                _declare_param(kernel, param)
        if limit := re.search(r"\.reqntid\s+([\d, ]+)", head[3]):
            kernel.threads = 1
            for n in limit[1].split(","):
                kernel.threads *= int(n)
        _body(kernel, text, head.end(), files)
    return found


def _declare_param(kernel: Kernel, text: str) -> None:
    words = text.split()
    kind = next(w[1:] for w in words if w.startswith(".") and w[1:] in SIZE)
    name = words[-1]
    count = 1
    if array := re.match(r"([\w$]+)\[(\d+)\]", name):
        name, count = array[1], int(array[2])
    align = SIZE[kind]
    if (
        ".align" in words and ".ptr" not in words
    ):  # of a pointer parameter, .align is that of what it points to
        align = int(words[words.index(".align") + 1])
    offset = -(-kernel.param_bytes // align) * align
    kernel.params[name] = (offset, SIZE[kind] * count)
    kernel.param_bytes = offset + SIZE[kind] * count


def _declare_shared(kernel: Kernel, text: str) -> None:
    array = re.search(r"([\w$]+)(?:\[(\d*)\])?$", text)
    if array[2] == "":
        kernel.shared[array[1]] = -1  # dynamic: behind the static ones
        return
    kind = next(w for w in re.findall(r"\.(\w+)", text) if w in SIZE)
    align = re.search(r"\.align\s+(\d+)", text)
    align = int(align[1]) if align else SIZE[kind]
    offset = -(-kernel.shared_bytes // align) * align
    kernel.shared[array[1]] = offset
    kernel.shared_bytes = offset + SIZE[kind] * int(array[2] or 1)


def _body(kernel: Kernel, text: str, at: int, files: dict[str, str]) -> None:
    """Parse statements up to the closing brace.

    Braces at the start of a statement open and close scopes, whose registers (of inline assembly)
    get names of their own; all other braces are vectors.
    """
    scopes: list[dict[str, str]] = [{}]
    statement, where, unique = "", "", 0
    while scopes:
        char = text[at]
        at += 1
        if char == ":" and re.fullmatch(r"\s*[\w$]+", statement) and text[at] != ":":
            label = statement.strip()
            kernel.labels[scopes[-1].get(label, label)] = len(kernel.code)
            statement = ""
        elif char == "{" and not statement.strip():
            unique += 1
            inner = {name: f"{name}.{unique}" for name in _labels(text, at)}
            scopes.append({**scopes[-1], **inner})
        elif char == "}" and not statement.strip():
            scopes.pop()
            statement = ""
        elif char == ";":
            words = statement.split()
            if words and words[0] == "@loc":
                where = f"{files.get(words[1], '?').rsplit('/', 1)[-1]}:{words[2]}"
            elif words and words[0] == ".reg":
                for name in " ".join(words[2:]).split(","):
                    name = name.strip()
                    if counted := re.fullmatch(r"(%?[\w$]+)<\d+>", name):
                        kernel.registers[counted[1] + "<>"] = _class(words[1])
                        continue
                    if len(scopes) > 1:
                        unique += 1
                        scopes[-1][name] = f"{name}.{unique}"
                        name = scopes[-1][name]
                    kernel.registers[name] = _class(words[1])
            elif words and words[0] == ".shared":
                _declare_shared(kernel, statement.strip())
            elif words and not words[0].startswith("."):
                kernel.code.append(_instruction(statement.strip(), scopes[-1], where))
            elif words and words[0] not in (".pragma",):
                raise NotImplementedError(f"PTX directive: {statement.strip()}")
            statement = ""
        else:
            statement += char


def _labels(text: str, at: int) -> list[str]:
    """Find the labels of the scope that opens before `at`."""
    end, depth = at, 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return re.findall(r"^\s*([\w$]+):(?!:)", text[at:end], re.M)


def _class(directive: str) -> str:
    kind = directive[1:]
    return "pred" if kind == "pred" else f"b{8 * max(SIZE[kind], 2)}"


def _instruction(text: str, names: dict[str, str], where: str) -> Instruction:
    full, guard, negated = re.sub(r"\s+", " ", text), None, False
    if guarded := re.match(r"@(!?)(%?[\w$]+)\s+", text):
        negated, guard = guarded[1] == "!", names.get(guarded[2], guarded[2])
        text = text[guarded.end() :]
    opcode, _, rest = text.partition(" ") if " " in text else (text, "", "")
    if "\t" in opcode:
        opcode, _, rest = text.partition("\t")
    operands = [_rename(part, names) for part in _split(rest)]
    return Instruction(opcode.strip(), operands, guard, negated, full, where)


def vector_of(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


def _rename(operand: str, names: dict[str, str]) -> str:
    if not names:
        return operand
    return re.sub(r"%?[\w$]+", lambda m: names.get(m[0], m[0]), operand)
