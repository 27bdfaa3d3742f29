"""Position maps as arguments of ops: a column for each field, an entry for each map.

A column that no map reads is left out: every list costs a call host time. C++ reads the columns in
csrc/common/map_args.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...scores.base import MapKind, PairRow, PlainMap, PositionMap

SCHEMA = {
    "map_kinds": "int[] map_kinds",
    "map_moduli": "int[]? map_moduli=None",
    "map_divisors": "float[]? map_divisors=None",
    "map_floors": "bool[]? map_floors=None",
    "map_offsets": "float[]? map_offsets=None",
    "map_caps": "float[]? map_caps=None",
    "map_rows": "int[]? map_rows=None",
}
# The entries of a map whose kind does not read the column.
_UNREAD = {
    "map_moduli": 0,
    "map_divisors": 1.0,
    "map_floors": False,
    "map_offsets": 0.0,
    "map_caps": 0.0,
    "map_rows": 0,
}
_READ = {
    MapKind.SAME: (),
    MapKind.SHIFTED: ("map_moduli", "map_offsets"),
    MapKind.GROUPED: ("map_moduli", "map_divisors", "map_floors", "map_offsets"),
    MapKind.CAPPED: ("map_moduli", "map_divisors", "map_floors", "map_offsets", "map_caps"),
    MapKind.CONSTANT: ("map_offsets",),
    MapKind.PER_PAIR: ("map_moduli", "map_floors", "map_rows"),
}
FARTHEST = 1 << 62  # past every position: there, all moduli and starts are alike


def columns_of(maps: Sequence[PlainMap]) -> dict[str, list[Any]]:
    """Return the columns of these maps, by name."""
    columns = {"map_kinds": [int(by.kind) for by in maps]}
    entries = [_entries(by) for by in maps]
    for n, (name, unread) in enumerate(_UNREAD.items()):
        column = [entry[n] for entry in entries]
        if any(x != unread for x in column):
            columns[name] = column
    return columns


def maps_of(op: str, columns: Mapping[str, Sequence[Any] | None], count: int) -> list[PlainMap]:
    """Rebuild `count` maps from their columns; there may be other arguments beside them."""
    kinds = columns["map_kinds"] or ()
    given = {name: columns.get(name) or [unread] * count for name, unread in _UNREAD.items()}
    for name, column in (("map_kinds", kinds), *given.items()):
        if len(column) != count:
            raise ValueError(f"{op}: {name} must be of {count} maps, got {len(column)}")
    for kind in kinds:
        if kind not in _READ:
            raise ValueError(f"{op}: map_kinds must be those of MapKind, got {kind}")
    for name, unread in _UNREAD.items():
        for kind, entry in zip(kinds, given[name]):
            if name not in _READ[MapKind(kind)] and entry != unread:
                raise ValueError(
                    f"{op}: {name} must be {unread} for a map of kind {kind}, got {entry}"
                )
    return [_map(*entries) for entries in zip(kinds, *given.values())]


def _entries(by: PlainMap) -> tuple[Any, ...]:
    """Return a map's entries in the columns after its kind.

    None is infinite: serialised graphs (AOTInductor) have no infinity.
    """
    modulus = min(int(by.modulus), FARTHEST)
    if isinstance(by, PairRow):
        return modulus, 1.0, by.floor, 0.0, 0.0, by.row
    if by.kind == MapKind.CONSTANT:
        return 0, 1.0, False, float(min(by.offset, by.cap)), 0.0, 0
    cap = float(by.cap) if by.kind == MapKind.CAPPED else 0.0
    return modulus, float(by.divisor), bool(by.floor), float(by.offset), cap, 0


def _map(
    kind: int, modulus: int, divisor: float, floor: bool, offset: float, cap: float, row: int
) -> PlainMap:
    kind = MapKind(kind)
    if kind == MapKind.PER_PAIR:
        return PairRow(modulus, floor, row)
    if kind == MapKind.CONSTANT:
        return PositionMap(divisor=math.inf, offset=offset)
    return PositionMap(modulus, divisor, floor, offset, cap if kind == MapKind.CAPPED else math.inf)
