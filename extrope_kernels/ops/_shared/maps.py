"""Position maps as arguments of ops: a column for each field, an entry for each map.

C++ reads them in csrc/common/regions.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...scores.base import MapKind, PairRow, PlainMap, PositionMap

COLUMNS = {
    "map_kinds": "int[]",
    "map_moduli": "int[]",
    "map_divisors": "float[]",
    "map_floors": "bool[]",
    "map_offsets": "float[]",
    "map_caps": "float[]",
    "map_rows": "int[]",
}
FARTHEST = 1 << 62  # past every position: there, all moduli and starts are alike


def columns_of(maps: Sequence[PlainMap]) -> dict[str, list[Any]]:
    """Return the columns of these maps, by name."""
    entries = [_entries(by) for by in maps]
    return {name: [entry[n] for entry in entries] for n, name in enumerate(COLUMNS)}


def maps_of(columns: Mapping[str, Sequence[Any]]) -> list[PlainMap]:
    """Rebuild the maps from their columns; there may be other arguments beside them."""
    return [_map(*entries) for entries in zip(*(columns[name] for name in COLUMNS), strict=True)]


def _entries(by: PlainMap) -> tuple[Any, ...]:
    """Return a map's entries. What its kind does not read is 0, or 1 if it is a divisor.

    So no entry is infinite: serialised graphs (AOTInductor) have no infinity.
    """
    kind, modulus = int(by.kind), min(int(by.modulus), FARTHEST)
    if isinstance(by, PairRow):
        return kind, modulus, 1.0, by.floor, 0.0, 0.0, by.row
    if kind == MapKind.CONSTANT:
        return kind, 0, 1.0, False, float(min(by.offset, by.cap)), 0.0, 0
    cap = float(by.cap) if kind == MapKind.CAPPED else 0.0
    return kind, modulus, float(by.divisor), bool(by.floor), float(by.offset), cap, 0


def _map(
    kind: int, modulus: int, divisor: float, floor: bool, offset: float, cap: float, row: int
) -> PlainMap:
    kind = MapKind(kind)
    if kind == MapKind.PER_PAIR:
        return PairRow(modulus, floor, row)
    if kind == MapKind.CONSTANT:
        return PositionMap(divisor=math.inf, offset=offset)
    return PositionMap(modulus, divisor, floor, offset, cap if kind == MapKind.CAPPED else math.inf)
