"""`Score`, which every score method yields: regions of keys, and the position maps of both sides.

Causal attention with changed positions is plain attention in a few regions. Query i and key j of
region r are rotated to the positions `q_map(i)` and `k_map(j)`, so that they see the difference of
the two; the region holds the keys

    start_r(i) <= j < start_{r+1}(i),    start_r(i) = i // granularity * granularity + start,

and the last one ends at the diagonal, j <= i. One softmax runs over all regions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

FIRST_KEY = -(1 << 62)  # as a start: from the first key on
# Serialised graphs (AOTInductor) have no infinity, so this number stands for it in an op's numbers.
_INFINITE = sys.float_info.max


class PositionMap(NamedTuple):
    """p becomes min(f((p mod modulus) / divisor) + offset, cap), where f is floor or nothing.

    Numbers, not a function, so that kernels evaluate it themselves. Modulus 0 is no modulus; with
    divisor inf every position becomes `offset`. A cap needs whole numbers: divisor 1 or floor.
    """

    modulus: int = 0
    divisor: float = 1.0
    floor: bool = False
    offset: float = 0.0
    cap: float = math.inf

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the positions (any shape, integers or floats) as they are mapped, in float64."""
        p = positions.double()
        if self.modulus:
            p = torch.remainder(p, self.modulus)
        p = p / self.divisor
        p = (p.floor() if self.floor else p) + self.offset
        return p.clamp(max=self.cap) if self.cap < math.inf else p

    def numbers(self) -> list[float]:
        """Return the map as an op takes it; C++ reads it in csrc/common/regions.h."""
        return [min(float(x), _INFINITE) for x in self]

    @classmethod
    def read(cls, numbers: Sequence[float]) -> PositionMap:
        """Return the map that `numbers` made."""
        modulus, divisor, floor, offset, cap = numbers
        divisor, cap = (math.inf if x >= _INFINITE else x for x in (divisor, cap))
        return cls(int(modulus), divisor, bool(floor), offset, cap)


MAP_NUMBERS = len(PositionMap._fields)
SAME = PositionMap()  # the token's own position
UNROTATED = PositionMap(divisor=math.inf)  # position 0


def constant(position: int) -> PositionMap:
    """Return the map that sends every token to one position."""
    return PositionMap(divisor=math.inf, offset=position)


class Region(NamedTuple):
    """The keys from `start` on, counted from the query's block, and the maps of both sides."""

    start: int
    q_map: PositionMap
    k_map: PositionMap


@dataclass(frozen=True)
class Score:
    """A score method with its parameters, as kernels see it.

    regions: one to three, far keys first; the first one starts at FIRST_KEY, or where a query's
        keys begin.
    granularity: queries of one block of so many tokens share the regions' starts.
    stored: where a cache keeps keys, rotated once for all: the map of the far regions.
    """

    name: str
    regions: tuple[Region, ...]
    granularity: int = 1
    stored: PositionMap = UNROTATED
    numbers: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # As every call hands them to an op: see AttentionCall.numbers.
        starts = [float(region.start) for region in self.regions]
        q_maps = [x for region in self.regions for x in region.q_map.numbers()]
        k_maps = [x for region in self.regions for x in region.k_map.numbers()]
        numbers = [float(self.granularity), *starts, *q_maps, *k_maps]
        object.__setattr__(self, "numbers", numbers)
