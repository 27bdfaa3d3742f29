"""Tables of tiles: what kernels are launched with, by kernel, chip and head_dim, as JSON.

configs.json of an operation is what ships, candidates.json what else is worth timing on a card. A
row of a chip holds for those after it too, up to the next one, and one of a head_dim up to that.
Float32, whose products run without tensor cores, has rows that serve all of a maker's chips.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

LEAST_SHARED = 86  # of NVIDIA's chips; older ones have no more shared memory


def tile(
    op: str, table: Path, kernel: str, head_dim: int, itemsize: int, chip: int | str
) -> dict[str, Any]:
    """The row of `kernel` for elements of itemsize bytes; chip as from `chip_of`.

    Raises NotImplementedError, which begins with `op`, for a chip that has none.
    """
    rows = _row(_load(table)[kernel], chip, itemsize)
    if rows is None:
        raise NotImplementedError(
            f"{op}: the Triton kernels have no tile for {itemsize}-byte elements on {chip}"
        )
    return rows[min((n for n in rows if head_dim <= int(n)), key=int)]


@functools.cache
def _load(table: Path) -> dict[str, dict[str, dict[str, dict]]]:
    return json.loads(table.read_text())


def _row(chips: dict[str, dict], chip: int | str, itemsize: int) -> dict[str, dict] | None:
    if not isinstance(chip, int):
        return chips.get(chip if itemsize < 4 else f"{chip} float32")
    if itemsize == 4:
        return chips["float32"]
    known = [int(name) for name in chips if name.isdigit()]
    older = LEAST_SHARED if LEAST_SHARED in known else min(known)
    return chips[str(max((n for n in known if n <= chip), default=older))]
