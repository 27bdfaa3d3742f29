"""The kernels' configuration tables as files: read them, replace a leaf, write them back.

{"forward": {"90": {"128": {"block_m": 128, ...}}}}: kernel, chip (and later ones up to the next
row), largest head_dim. A leaf that was timed on a card has "measured" and "card" beside its fields,
and is not used for other audited chips. candidates.json has a list of configurations in each leaf.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from machine_code import CHIPS

from .step import ROOT

CONFIGS, CANDIDATES = "configs.json", "candidates.json"
ABOUT = ("measured", "card")  # entries of a leaf beside its fields


@dataclass
class ConfigTable:
    """The files of one op."""

    folder: Path

    @classmethod
    def of(cls, op: str) -> ConfigTable:
        return cls(ROOT.joinpath("extrope_kernels", "ops", *op.split(".")))

    def missing(self) -> str:
        names = [name for name in (CONFIGS, CANDIDATES) if not (self.folder / name).exists()]
        return f"{self.folder.relative_to(ROOT)} has no {' and no '.join(names)}" if names else ""

    def candidates(self, kernel: str, capability: int) -> dict[int, list[dict]]:
        """Return the configurations to time by head_dim, the shipped leaf first."""
        found = {}
        listed = rows_for(self._read(CANDIDATES).get(kernel, {}), capability)
        shipped = rows_for(self._read(CONFIGS)[kernel], capability)
        for dim, leaves in sorted((int(dim), leaves) for dim, leaves in listed.items()):
            own = next(leaf for most, leaf in _by_dim(shipped) if dim <= most)
            every = [fields_of(own), *map(fields_of, leaves)]
            found[dim] = [leaf for i, leaf in enumerate(every) if leaf not in every[:i]]
        return found

    def replace(self, kernel: str, capability: int, head_dim: int, leaf: dict, card: str) -> None:
        """Write the winning leaf for this chip, and keep those of other audited chips.

        A chip without its own row gets one, and so does the next chip that shared its row.
        """
        table = self._read(CONFIGS)
        rows = table[kernel]
        own = rows_for(rows, capability)
        shared = {dim: fields_of(old) for dim, old in own.items()}
        after = next((chip for chip in CHIPS if chip > capability), capability)
        if rows_for(rows, after) is own:
            rows.setdefault(str(after), dict(shared))
        row = rows.setdefault(str(capability), shared)
        row[str(head_dim)] = {**fields_of(leaf), "measured": True, "card": card}
        (self.folder / CONFIGS).write_text(dumped(table))

    def _read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


def rows_for(by_chip: dict, capability: int) -> dict:
    """Return the rows of the chip, or of the last one before it."""
    chips = [chip for chip in by_chip if chip.isdigit() and int(chip) <= capability]
    return by_chip[max(chips, key=int)] if chips else {}


def fields_of(leaf: dict) -> dict:
    return {name: value for name, value in leaf.items() if name not in ABOUT}


def dumped(table: dict) -> str:
    """Format one leaf a line; chips and head_dims in numerical order."""
    ordered = {
        kernel: {chip: _in_order(by_dim) for chip, by_dim in _in_order(by_chip).items()}
        for kernel, by_chip in table.items()
    }
    text = json.dumps(ordered, indent=1) + "\n"
    return re.sub(r"\{[^{}]*\}", lambda leaf: json.dumps(json.loads(leaf[0])), text)


def _by_dim(rows: dict) -> list[tuple[int, dict]]:
    return sorted((int(dim), leaf) for dim, leaf in rows.items())


def _in_order(rows: dict) -> dict:
    """Sort by keys: words, if there are any, come after numbers."""

    def place(name: str) -> tuple[bool, str, str]:
        return not name.isdigit(), name.split()[0].zfill(9), name

    return {name: rows[name] for name in sorted(rows, key=place)}
