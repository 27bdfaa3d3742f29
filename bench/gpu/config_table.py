"""The configuration tables of the kernels, as files: read, a leaf replaced, written back.

{"forward": {"90": {"128": {"block_m": 128, ...}}}}: kernel, chip (also for those after it, up to
the next one), head_dim up to. A leaf that was timed on a card has "measured" and "card" beside its
fields, and stands for no other chip that is audited. candidates.json is the same with a list of
configurations for each leaf.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from machine_code import CHIPS

from .step import ROOT

CONFIGS, CANDIDATES = "configs.json", "candidates.json"
ABOUT = ("measured", "card")  # what a leaf says beside its fields


@dataclass
class ConfigTable:
    """One op's files."""

    folder: Path

    @classmethod
    def of(cls, op: str) -> ConfigTable:
        return cls(ROOT.joinpath("extrope_kernels", "ops", *op.split(".")))

    def missing(self) -> str:
        names = [name for name in (CONFIGS, CANDIDATES) if not (self.folder / name).exists()]
        return f"{self.folder.relative_to(ROOT)} has no {' and no '.join(names)}" if names else ""

    def candidates(self, kernel: str, capability: int) -> dict[int, list[dict]]:
        """By head_dim: what is to be timed there, the shipped leaf first."""
        found = {}
        listed = rows_for(self._read(CANDIDATES).get(kernel, {}), capability)
        shipped = rows_for(self._read(CONFIGS)[kernel], capability)
        for dim, leaves in sorted((int(dim), leaves) for dim, leaves in listed.items()):
            own = next(leaf for most, leaf in _by_dim(shipped) if dim <= most)
            every = [fields_of(own), *map(fields_of, leaves)]
            found[dim] = [leaf for i, leaf in enumerate(every) if leaf not in every[:i]]
        return found

    def replace(self, kernel: str, capability: int, head_dim: int, leaf: dict, card: str) -> None:
        """Write the leaf that won for this chip, and keep what other audited chips have: one
        without a row of its own gets one, and so does the next after it that shared its row.
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
    """Those of the chip, or of the last one before it."""
    chips = [chip for chip in by_chip if chip.isdigit() and int(chip) <= capability]
    return by_chip[max(chips, key=int)] if chips else {}


def fields_of(leaf: dict) -> dict:
    return {name: value for name, value in leaf.items() if name not in ABOUT}


def dumped(table: dict) -> str:
    """One leaf a line; chips and head_dims in the order of their numbers."""
    kernels = []
    for kernel, by_chip in table.items():
        chips = []
        for chip, by_dim in sorted(by_chip.items(), key=lambda item: _number(item[0])):
            leaves = [
                f'   "{dim}": {json.dumps(leaf)}'
                for dim, leaf in sorted(by_dim.items(), key=lambda item: _number(item[0]))
            ]
            chips.append(f'  "{chip}": {{\n' + ",\n".join(leaves) + "\n  }")
        kernels.append(f' "{kernel}": {{\n' + ",\n".join(chips) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _by_dim(rows: dict) -> list[tuple[int, dict]]:
    return sorted((int(dim), leaf) for dim, leaf in rows.items())


def _number(key: str) -> tuple[int, str]:
    """Words, should a table have such rows, come behind the numbers."""
    return (int(key), "") if key.isdigit() else (10**9, key)
