"""The audit on the terminal, and as a JSON file: one line a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, fields
from importlib.metadata import version
from pathlib import Path

from .case import Case
from .chips import CARDS
from .entries import KERNELS, all_cases
from .measured import allowed_stack
from .reading import Stretch, reader
from .row import Row, faults

RESOURCES = ("memory", "tensor", "special", "issue")
COLUMNS = tuple(field.name for field in fields(Row))
STRETCH = tuple(field.name for field in fields(Stretch))


def judge(rows: Mapping[Case, Row]) -> dict[Case, list[str]]:
    """The faults of every row; a plain kernel that is not among the rows holds no stack."""
    found = {}
    for case, row in rows.items():
        kernel = KERNELS[case.kernel]
        plain = rows.get(kernel.plain(case)) if kernel.plain else None
        told = row, plain, kernel.holds_stack, allowed_stack(case)
        found[case] = [] if is_yardstick(case) else faults(*told)
    return found


def is_yardstick(case: Case) -> bool:
    return case.kernel.startswith("plain")


def show(rows: Mapping[Case, Row], failed: Mapping[Case, str]) -> int:
    """Print all rows and what is wrong; the number of cases with faults."""
    head = ("kernel", "sm", "D", "type", "for", "regs", "stack", "shared", "warps/SM")
    head += ("loads", "stores", "loops: instructions/products/special", "at least")
    lines = [head, *map(_line, rows.values())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    wrong = {case: found for case, found in judge(rows).items() if found}
    for case, found in wrong.items():
        print(f"{case}: {'; '.join(found)}")
    for case, reason in failed.items():
        print(f"{case} does not compile:\n{reason}")
    left = len(all_cases()) - len(rows) - len(failed)
    print(
        f"{len(rows)} configurations compiled, none run; {len(wrong)} with faults; "
        f"{len(failed)} do not compile; {left} left out"
    )
    return len(wrong) + len(failed)


def _line(row: Row) -> tuple[str, ...]:
    card = CARDS.get(row.capability)
    time = f"{card.name} {max(row.seconds.values()) * 1e6:.1f} us ({row.bound})" if card else ""
    return (
        row.kernel,
        str(row.capability),
        str(row.head_dim),
        row.dtype,
        row.variant,
        str(row.registers),
        str(row.stack),
        str(row.shared),
        str(row.blocks * row.warps),
        _accesses(row.loads),
        _accesses(row.stores),
        " ".join(f"{x.instructions}/{x.products}/{x.special}" for x in row.loops),
        time,
    )


def _accesses(by_bytes: Mapping[int, int]) -> str:
    return " ".join(f"{n}x{size}B" for size, n in by_bytes.items())


def save(rows: Mapping[Case, Row], path: Path, failed: Mapping[Case, str]) -> None:
    content = {
        "how": "compiled, not run",
        "configurations": len(all_cases()),
        "triton": version("triton"),
        "failed": {str(case): reason.splitlines()[-1] for case, reason in failed.items()},
        "read_by": reader(),
        "seconds": RESOURCES,
        "stretch": STRETCH,  # of loops, around and outside them
        "columns": COLUMNS,
    }
    lines = ",\n".join(json.dumps(_fields(row), separators=(",", ":")) for row in rows.values())
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content)[:-1] + ', "rows": [\n' + lines + "\n]}\n")


def load(path: Path) -> dict[Case, Row]:
    return _load(json.loads(path.read_text()))


def load_known(path: Path) -> dict[Case, Row]:
    """The rows that another reading of the same machine code would give again."""
    content = json.loads(path.read_text()) if path.exists() else {}
    same = (content.get("read_by"), content.get("columns")) == (reader(), list(COLUMNS))
    return _load(content) if same else {}


def _load(content: dict) -> dict[Case, Row]:
    rows = [_row(dict(zip(content["columns"], fields))) for fields in content["rows"]]
    return {row.case: row for row in rows}


def _fields(row: Row) -> list:
    values = {name: getattr(row, name) for name in COLUMNS}
    values["outside"], values["around"] = list(astuple(row.outside)), list(astuple(row.around))
    values["loops"] = [astuple(loop) for loop in row.loops]
    values["seconds"] = [float(f"{row.seconds[name]:.3g}") for name in RESOURCES if row.seconds]
    values["narrow"] = int(row.narrow)
    return list(values.values())


def _row(values: dict) -> Row:
    for name in ("loads", "stores"):
        values[name] = {int(size): n for size, n in values[name].items()}
    values["outside"], values["around"] = (Stretch(*values[x]) for x in ("outside", "around"))
    values["loops"] = tuple(Stretch(*loop) for loop in values["loops"])
    values["seconds"] = dict(zip(RESOURCES, values["seconds"]))
    return Row(**{**values, "narrow": bool(values["narrow"])})
