"""`Score`, the result of every score method: regions of keys, with position maps for both sides.

Causal attention with changed positions is plain attention in a few regions. In region r, query i is
rotated to position `q_map(i)` and key j to `k_map(j)`: the pair sees the difference of the two. The
region holds the keys

    start_r(i) <= j < start_{r+1}(i),    start_r(i) = i // granularity * granularity + start,

and the last one ends at the diagonal, j <= i. One softmax runs over all regions. A map that differs
between pairs of dims, or between heads, is a `PairMap`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIRST_KEY = -(1 << 62)  # a start: from the first key on
# Serialised graphs (AOTInductor) have no infinity: in an op's numbers this stands for it.
_INFINITE = sys.float_info.max


class PositionMap(NamedTuple):
    """Map p to min(f((p mod modulus) / divisor) + offset, cap), where f is floor or the identity.

    It is numbers, not a function, so that kernels can evaluate it. In `Score.plain` a negative
    divisor stands for a PairMap: see `row`.

    modulus: in tokens; 0 for none.
    divisor: > 0, a whole number with floor; with inf every position becomes `offset`.
    floor: True for whole numbers.
    offset: in tokens, added after the division.
    cap: the largest result, in tokens; needs whole numbers: divisor 1 or floor.
    """

    modulus: int = 0
    divisor: float = 1.0
    floor: bool = False
    offset: float = 0.0
    cap: float = math.inf

    def __call__(self, positions: Tensor) -> Tensor:
        """Map positions (any shape, integers or floats); return float64."""
        p = positions.double()
        if self.modulus:
            p = torch.remainder(p, self.modulus)
        p = p / self.divisor
        p = (p.floor() if self.floor else p) + self.offset
        return p.clamp(max=self.cap) if self.cap < math.inf else p

    @property
    def row(self) -> int | None:
        """The row of `Score.pair_maps` with the divisors and offsets; None: the same for all."""
        return int(-self.divisor) - 1 if self.divisor < 0 else None

    def numbers(self) -> list[float]:
        """Return the map in an op's numbers; C++ reads them in csrc/common/regions.h."""
        return [min(float(x), _INFINITE) for x in self]

    @classmethod
    def read(cls, numbers: Sequence[float]) -> PositionMap:
        """Build the map from the result of `numbers`."""
        modulus, divisor, floor, offset, cap = numbers
        divisor, cap = (math.inf if x >= _INFINITE else x for x in (divisor, cap))
        return cls(int(modulus), divisor, bool(floor), offset, cap)


MAP_NUMBERS = len(PositionMap._fields)
SAME = PositionMap()  # the token's own position
UNROTATED = PositionMap(divisor=math.inf)  # position 0


def constant(position: int) -> PositionMap:
    """Return the map that sends every token to one position."""
    return PositionMap(divisor=math.inf, offset=position)


@dataclass(frozen=True, eq=False)
class PairMap:
    """Map p, for pair i of dims, to f((p mod modulus) / divisor_i) + offset_i.

    divisor, offset: (pairs,) for all heads, or (heads_k, pairs), as tensors or lists of numbers.
        Divisors are > 0, and whole numbers with floor; the offset may be one number. Without floor
        both may require gradients.
    modulus: in tokens; 0 for none.
    floor: True for whole numbers.

    A divisor of theta_i / theta'_i replaces the frequency theta_i by theta'_i.
    """

    divisor: Tensor
    offset: Any = 0.0
    modulus: int = 0
    floor: bool = False

    def __post_init__(self) -> None:
        given = self.divisor
        # Numbers are read here, so they cannot be made on any default device (meta has none).
        device = given.device if isinstance(given, Tensor) else "cpu"
        divisor = torch.as_tensor(given, dtype=torch.float64, device=device)
        if divisor.dim() not in (1, 2) or not divisor.numel():
            raise ValueError(
                "PairMap: divisor must be (pairs,) or (heads_k, pairs), "
                f"got shape {tuple(divisor.shape)}"
            )
        offset = torch.as_tensor(self.offset, dtype=torch.float64, device=divisor.device)
        if torch.broadcast_shapes(offset.shape, divisor.shape) != divisor.shape:
            raise ValueError(
                f"PairMap: offset must be a number or as divisor {tuple(divisor.shape)}, "
                f"got shape {tuple(offset.shape)}"
            )
        if not torch.compiler.is_compiling():  # in a graph it has no values to read
            _check_values(divisor.detach(), offset.detach(), self.floor)
        object.__setattr__(self, "divisor", divisor)
        object.__setattr__(self, "offset", offset.expand(divisor.shape))

    def __call__(self, positions: Tensor) -> Tensor:
        """Map positions (any shape) for each pair: (..., *divisor.shape) float64."""
        divisor, offset = (x.to(positions.device) for x in (self.divisor, self.offset))
        return map_pairs(positions, self.modulus, divisor, self.floor, offset)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PairMap):
            return NotImplemented
        same = (self.modulus, self.floor) == (other.modulus, other.floor)
        return same and self.same_row(other)

    def __hash__(self) -> int:
        return hash((self.modulus, self.floor, self.divisor.shape))

    def same_row(self, other: PairMap) -> bool:
        """Return True if divisors and offsets are equal and will stay so (no gradients)."""
        if self.divisor is other.divisor and self.offset is other.offset:
            return True
        tensors = (self.divisor, self.offset, other.divisor, other.offset)
        if any(x.requires_grad for x in tensors):
            return False
        return torch.equal(self.divisor, other.divisor) and torch.equal(self.offset, other.offset)


def _check_values(divisor: Tensor, offset: Tensor, floor: bool) -> None:
    if not (divisor > 0).all() or (floor and (divisor != divisor.round()).any()):
        kind = "whole numbers > 0 with floor" if floor else "> 0"
        raise ValueError(f"PairMap: divisor must be {kind}, got {divisor.tolist()}")
    if not offset.isfinite().all():
        raise ValueError(f"PairMap: offset must be finite, got {offset.tolist()}")


def map_pairs(
    positions: Tensor, modulus: int, divisor: Tensor, floor: bool, offset: Tensor
) -> Tensor:
    """Map positions (any shape) as a PairMap with these values: (..., *divisor.shape)."""
    of_pairs = PositionMap(modulus, divisor, floor, offset)
    return of_pairs(positions.reshape(*positions.shape, *[1] * divisor.dim()))


class Region(NamedTuple):
    """The keys from `start` to the next region, or to the query's own, with the maps of both sides.

    start: the first key, in tokens from the query's block on; FIRST_KEY for the sequence's first.
    q_map, k_map: the positions to which queries and keys are rotated.
    """

    start: int
    q_map: PositionMap | PairMap
    k_map: PositionMap | PairMap


@dataclass(frozen=True)
class Score:
    """A score method with its parameters, in the form that kernels read.

    name: the beginning of a call's errors.
    regions: one to three, far keys first. The first one starts at FIRST_KEY, or at the first key
        that a query sees.
    granularity: block size in tokens; queries of one block share the regions' starts.
    stored: the map that rotates keys, once, before a cache stores them: that of the far regions.
    """

    name: str
    regions: tuple[Region, ...]
    granularity: int = 1
    stored: PositionMap | PairMap = UNROTATED
    # The arguments of every op call, see AttentionCall: numbers, and the divisors and offsets of
    # all PairMaps, (rows, 2, heads_k or 1, pairs) float64, or None.
    numbers: list[float] = field(init=False, repr=False, compare=False)
    pair_maps: Tensor | None = field(init=False, repr=False, compare=False)
    _in_rows: Score | None = field(init=False, repr=False, compare=False)
    _copies: dict[tuple[torch.device, bool], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("granularity", self.granularity),
            *[("a region's start", region.start) for region in self.regions],
        ):
            if not (abs(value) < math.inf and value == int(value)):
                raise ValueError(f"{self.name}: {name} must be a whole number, got {value}")
        for by in (*[x for _, *maps in self.regions for x in maps], self.stored):
            _check_map(self.name, by)
        rows: list[PairMap] = []
        starts = [float(region.start) for region in self.regions]
        q_maps = [x for region in self.regions for x in _plain(region.q_map, rows).numbers()]
        k_maps = [x for region in self.regions for x in _plain(region.k_map, rows).numbers()]
        numbers = [float(self.granularity), *starts, *q_maps, *k_maps]
        stored = _plain(self.stored, rows)
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "pair_maps", _table(self.name, rows) if rows else None)
        in_rows = None
        if rows:
            regions = tuple(
                Region(x.start, _plain(x.q_map, rows), _plain(x.k_map, rows)) for x in self.regions
            )
            in_rows = Score(self.name, regions, self.granularity, stored)
        object.__setattr__(self, "_in_rows", in_rows)
        object.__setattr__(self, "_copies", {})

    def pair_maps_on(self, x: Tensor) -> Tensor | None:
        """Return `pair_maps` on the device of x, copied there once, for training once more."""
        maps = self.pair_maps
        if maps is None or maps.device == x.device or maps.requires_grad:
            return maps if maps is None else maps.to(x.device)
        # Copies made in inference mode cannot be saved for a backward.
        key = (x.device, torch.is_grad_enabled())
        found = self._copies.get(key)
        if found is None:
            found = maps.to(x.device)
            if type(found) is Tensor:  # no fake one, as while torch.export makes a graph
                self._copies[key] = found
        return found

    def stored_at(self, positions: Tensor) -> Tensor:
        """Map positions (...) by `stored`: (...), or (..., pairs) by a PairMap of all heads."""
        maps = self.pair_maps_on(positions)
        if maps is None or isinstance(self.stored, PositionMap):
            return self.stored(positions)
        divisor, offset = maps[self.plain.stored.row, :, 0]  # type: ignore[union-attr]
        return map_pairs(positions, self.stored.modulus, divisor, self.stored.floor, offset)

    @property
    def plain(self) -> Score:
        """The same score in numbers only: each PairMap is a row of `pair_maps`."""
        return self._in_rows or self


def _check_map(name: str, by: PositionMap | PairMap) -> None:
    """Raise ValueError for numbers that kernels would not all read alike."""
    if not (0 <= by.modulus < math.inf and by.modulus == int(by.modulus)):
        raise ValueError(f"{name}: a map's modulus must be a whole number >= 0, got {by.modulus}")
    if isinstance(by, PairMap):
        return
    if not (by.divisor > 0 or by.row is not None) or not abs(by.offset) < math.inf:
        raise ValueError(f"{name}: a map must have a divisor > 0 and a finite offset, got {by}")
    if by.floor and not (by.divisor == math.inf or by.divisor == int(by.divisor)):
        raise ValueError(f"{name}: a map with floor must have a whole divisor, got {by}")
    if by.cap == math.inf:
        return
    whole = by.floor or by.divisor in (1, math.inf)
    if not (whole and by.offset == int(by.offset) and by.cap == int(by.cap)):
        raise ValueError(f"{name}: a map with a cap must have whole numbers only, got {by}")


def _plain(of_pairs: PositionMap | PairMap, rows: list[PairMap]) -> PositionMap:
    """Return the map in numbers; add a PairMap's divisors and offsets to the rows."""
    if isinstance(of_pairs, PositionMap):
        return of_pairs
    readable = not torch.compiler.is_compiling()  # values can be compared
    same = (n for n, x in enumerate(rows) if x is of_pairs or (readable and x.same_row(of_pairs)))
    row = next(same, len(rows))
    if row == len(rows):
        rows.append(of_pairs)
    return PositionMap(of_pairs.modulus, -1.0 - row, of_pairs.floor)


def _table(name: str, rows: list[PairMap]) -> Tensor:
    pairs = {x.divisor.shape[-1] for x in rows}
    heads = {x.divisor.shape[0] for x in rows if x.divisor.dim() == 2}
    if len(pairs) > 1 or len(heads) > 1:
        shapes = [tuple(x.divisor.shape) for x in rows]
        raise ValueError(f"{name}: PairMaps must be of the same pairs and heads, got {shapes}")
    shape = (*(heads or {1}), *pairs)
    tables = [torch.stack((x.divisor.expand(shape), x.offset.expand(shape))) for x in rows]
    return torch.stack(tables)
