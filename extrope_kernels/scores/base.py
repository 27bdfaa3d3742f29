"""`Score`, the result of every score method: regions of keys, with position maps for both sides.

Causal attention with changed positions is plain attention in a few regions. In region r, query i is
rotated to position `q_map(i)` and key j to `k_map(j)`: the pair sees the difference of the two. The
region holds the keys

    start_r(i) <= j < start_{r+1}(i),    start_r(i) = i // granularity * granularity + start,

and the last one ends at the diagonal, j <= i. One softmax runs over all regions. A map that differs
between pairs of dims is a `PairMap`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from numbers import Real
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

Given = ParamSpec("Given")
FIRST_KEY = -(1 << 62)  # a start: from the first key on
# Of all that rotates, either way: positions are float64, and past it tokens that follow each other
# share one.
FARTHEST_POSITION = 2**53
# Tokens of a call are below 2**31: divided by it, they are not past the farthest position.
LEAST_DIVISOR = 2**-22
_BOUNDS = "a map must have a divisor >= 2**-22 and an offset within 2**53"


class MapKind(IntEnum):
    """What a map makes of a position p; f is floor or the identity. C++: csrc/common/regions.h."""

    SAME = 0  # p
    SHIFTED = 1  # (p mod modulus) + offset
    GROUPED = 2  # f((p mod modulus) / divisor) + offset
    CAPPED = 3  # min(f((p mod modulus) / divisor) + offset, cap)
    CONSTANT = 4  # offset
    PER_PAIR = 5  # f((p mod modulus) / divisor_i) + offset_i for pair i, from a row of pair_maps


class PositionMap(NamedTuple):
    """Map p to min(f((p mod modulus) / divisor) + offset, cap), where f is floor or the identity.

    It is numbers, not a function, so that kernels can evaluate it.

    modulus: in tokens; 0 for none.
    divisor: >= 2**-22, a whole number with floor; with inf every position becomes `offset`.
    floor: True for whole numbers.
    offset: in tokens, within 2**53 either way, added after the division.
    cap: the largest result, in tokens, from -2**53 on; needs whole numbers: divisor 1 or floor.
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
    def kind(self) -> MapKind:
        """The simplest kind that has these numbers."""
        if self.divisor == math.inf:
            return MapKind.CONSTANT
        if self.cap < math.inf:
            return MapKind.CAPPED
        if self.divisor != 1 or self.floor:
            return MapKind.GROUPED
        return MapKind.SHIFTED if self.modulus or self.offset else MapKind.SAME

    @property
    def row(self) -> None:
        """None: all pairs have the same divisor and offset, see PairRow."""
        return None


class PairRow(NamedTuple):
    """A PairMap in `Score.plain`: its divisors and offsets are a row of `Score.pair_maps`."""

    modulus: int
    floor: bool
    row: int

    @property
    def kind(self) -> MapKind:
        return MapKind.PER_PAIR


PlainMap = PositionMap | PairRow
SAME = PositionMap()  # the token's own position
UNROTATED = PositionMap(divisor=math.inf)  # position 0


def constant(position: int) -> PositionMap:
    """Return the map that sends every token to one position."""
    return PositionMap(divisor=math.inf, offset=position)


@dataclass(frozen=True, eq=False)
class PairMap:
    """Map p, for pair i of dims, to f((p mod modulus) / divisor_i) + offset_i.

    divisor, offset: (pairs,), as tensors or lists of numbers, without a gradient; bounds as for
        PositionMap. Divisors are whole numbers with floor; the offset may be one number.
    modulus: in tokens; 0 for none.
    floor: True for whole numbers.

    A divisor of theta_i / theta'_i replaces the frequency theta_i by theta'_i.
    """

    divisor: Tensor
    offset: Any = 0.0
    modulus: int = 0
    floor: bool = False

    def __post_init__(self) -> None:
        if type(self.floor) is not bool:
            raise TypeError(f"PairMap: floor must be a bool, got {self.floor!r}")
        divisor = _float64("divisor", self.divisor)
        if divisor.dim() != 1 or not divisor.numel():
            raise ValueError(f"PairMap: divisor must be (pairs,), got shape {tuple(divisor.shape)}")
        offset = _float64("offset", self.offset).to(divisor.device)
        if offset.shape not in ((), (1,), divisor.shape):
            raise ValueError(
                f"PairMap: offset must be a number or as divisor {tuple(divisor.shape)}, "
                f"got shape {tuple(offset.shape)}"
            )
        if not torch.compiler.is_compiling():  # in a graph it has no values to read
            _check_values(divisor, offset, self.floor)
        object.__setattr__(self, "divisor", divisor)
        object.__setattr__(self, "offset", offset.expand(divisor.shape))

    def __call__(self, positions: Tensor) -> Tensor:
        """Map positions (any shape) for each pair: (..., pairs) float64."""
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
        """Return True if divisors and offsets are equal."""
        return torch.equal(self.divisor, other.divisor) and torch.equal(self.offset, other.offset)


def _float64(name: str, given: Any) -> Tensor:
    """Return numbers as float64, on their own device, or the CPU: a default may be meta."""
    device = given.device if isinstance(given, Tensor) else "cpu"
    try:
        x = torch.as_tensor(given, device=device)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"PairMap: {name} must be numbers, got {given!r}") from None
    if x.is_complex():
        raise TypeError(f"PairMap: {name} must be real numbers, got {x.dtype}")
    if x.requires_grad:
        raise ValueError(f"PairMap: {name} must not require grad, got one that does")
    return torch.as_tensor(given, dtype=torch.float64, device=device)


def _check_values(divisor: Tensor, offset: Tensor, floor: bool) -> None:
    if floor and (divisor != divisor.round()).any():
        raise ValueError(
            f"PairMap: divisor must be whole numbers with floor, got {divisor.tolist()}"
        )
    check_of_pairs("PairMap", divisor, offset)


def check_of_pairs(name: str, divisor: Tensor, offset: Tensor) -> None:
    """Check the values of a map of pairs, whose results must be positions."""
    if not ((divisor >= LEAST_DIVISOR) & (offset.abs() <= FARTHEST_POSITION)).all():
        raise ValueError(f"{name}: {_BOUNDS}, got {divisor.tolist()} and {offset.tolist()}")


def map_pairs(
    positions: Tensor, modulus: int, divisor: Tensor, floor: bool, offset: Tensor
) -> Tensor:
    """Map positions (any shape) as a PairMap with these values (pairs,): (..., pairs)."""
    return PositionMap(modulus, divisor, floor, offset)(positions.unsqueeze(-1))


class Region(NamedTuple):
    """The keys from `start` to the next region, or to the query's own, with the maps of both sides.

    start: the first key, in tokens from the query's block on; FIRST_KEY for the sequence's first.
    q_map, k_map: the positions to which queries and keys are rotated.
    """

    start: int
    q_map: PlainMap | PairMap
    k_map: PlainMap | PairMap


@dataclass(frozen=True, repr=False)
class Score:
    """A score method with its parameters, in the form that kernels read.

    name: the beginning of a call's errors.
    regions: one to three, far keys first. The first one starts at FIRST_KEY, or at the first key
        that a query sees.
    granularity: block size in tokens; queries of one block share the regions' starts.
    stored: the map that rotates keys, once, before a cache stores them: that of the far regions, or
        UNROTATED where a region sees keys by a PairMap.
    given: the method's parameters by name, to show them; they change nothing.
    """

    name: str
    regions: tuple[Region, ...]
    granularity: int = 1
    stored: PositionMap = UNROTATED
    given: Mapping[str, Any] | None = field(default=None, compare=False)
    # Divisors and offsets of all PairMaps, (rows, 2, pairs) float64, or None.
    pair_maps: Tensor | None = field(init=False, compare=False)
    _in_rows: Score | None = field(init=False, compare=False)
    _copies: dict[tuple[torch.device, bool], Tensor] = field(init=False, compare=False)
    _hash: int | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for region in self.regions:
            if not isinstance(region, Region):
                raise TypeError(f"{self.name}: regions must be Regions, got {region!r}")
        for name, value in (
            ("granularity", self.granularity),
            *[("a region's start", region.start) for region in self.regions],
        ):
            if not (abs(value) < math.inf and value == int(value)):
                raise ValueError(f"{self.name}: {name} must be a whole number, got {value}")
        if self.granularity < 1:
            raise ValueError(f"{self.name}: granularity must be >= 1, got {self.granularity}")
        starts = [region.start for region in self.regions]
        if not 1 <= len(starts) <= 3 or starts != sorted(starts):
            raise ValueError(f"{self.name}: one to three regions must start in order, got {starts}")
        for by in (*[x for _, *maps in self.regions for x in maps], self.stored):
            check_map(self.name, by)
        if not isinstance(self.stored, PositionMap):
            raise TypeError(f"{self.name}: stored must be a PositionMap, got {self.stored!r}")
        rows: list[PairMap] = []
        regions = tuple(
            Region(x.start, _plain(x.q_map, rows), _plain(x.k_map, rows)) for x in self.regions
        )
        in_rows = Score(self.name, regions, self.granularity, self.stored) if rows else None
        object.__setattr__(self, "pair_maps", _table(self.name, rows) if rows else None)
        object.__setattr__(self, "_in_rows", in_rows)
        object.__setattr__(self, "_copies", {})
        object.__setattr__(self, "_hash", None)

    def __repr__(self) -> str:
        if self.given is None:
            return f"Score({self.name!r}, {self.regions}, {self.granularity}, {self.stored})"
        given = (f"{name}={_shown(value)}" for name, value in self.given.items())
        return f"{self.name}({', '.join(given)})"

    def __hash__(self) -> int:
        found = self._hash
        if found is None:  # kept, because every call looks its score up
            found = hash((self.name, self.regions, self.granularity, self.stored))
            object.__setattr__(self, "_hash", found)
        return found

    def pair_maps_on(self, x: Tensor) -> Tensor | None:
        """Return `pair_maps` on the device of x, copied there once, for training once more."""
        maps = self.pair_maps
        if maps is None or maps.device == x.device:
            return maps
        # Copies made in inference mode cannot be saved for a backward.
        key = (x.device, torch.is_grad_enabled())
        found = self._copies.get(key)
        if found is None:
            found = maps.to(x.device)
            if type(found) is Tensor:  # no fake one, as while torch.export makes a graph
                self._copies[key] = found
        return found

    @property
    def plain(self) -> Score:
        """The same score in numbers only: each PairMap is a row of `pair_maps`."""
        return self._in_rows or self


def made_once(make: Callable[Given, Score]) -> Callable[Given, Score]:
    """Let a function of numbers keep its scores: models ask for the same one in every call."""
    kept: Any = functools.lru_cache(256, typed=True)(make)

    @functools.wraps(make)
    def made(*args: Given.args, **options: Given.kwargs) -> Score:
        if not torch.compiler.is_compiling():  # a cache would not be traced
            with contextlib.suppress(TypeError):  # what has no hash, or is refused: said below
                return kept(*args, **options)
        return make(*args, **options)

    return made


def _shown(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"{value}"


def check_map(name: str, by: PlainMap | PairMap) -> None:
    """Raise an error for numbers that kernels would not all read alike."""
    if not isinstance(by, (PositionMap, PairRow, PairMap)):
        raise TypeError(f"{name}: a map must be a PositionMap or a PairMap, got {by!r}")
    if isinstance(by.modulus, bool) or not isinstance(by.modulus, (Real, torch.SymInt)):
        raise TypeError(f"{name}: a map's modulus must be a whole number, got {by.modulus!r}")
    if type(by.floor) is not bool:
        raise TypeError(f"{name}: a map's floor must be a bool, got {by.floor!r}")
    if not (0 <= by.modulus < math.inf and by.modulus == int(by.modulus)):
        raise ValueError(f"{name}: a map's modulus must be a whole number >= 0, got {by.modulus}")
    if isinstance(by, (PairMap, PairRow)):
        return
    if not by.divisor >= LEAST_DIVISOR or not abs(by.offset) <= FARTHEST_POSITION:
        raise ValueError(f"{name}: {_BOUNDS}, got {by}")
    if by.floor and not (by.divisor == math.inf or by.divisor == int(by.divisor)):
        raise ValueError(f"{name}: a map with floor must have a whole divisor, got {by}")
    if by.cap == math.inf:
        return
    whole = by.floor or by.divisor in (1, math.inf)
    if not (whole and by.offset == int(by.offset) and by.cap == int(by.cap)):
        raise ValueError(f"{name}: a map with a cap must have whole numbers only, got {by}")
    if by.cap < -FARTHEST_POSITION:
        raise ValueError(f"{name}: a map's cap must be >= -2**53, got {by}")


def _plain(by: PlainMap | PairMap, rows: list[PairMap]) -> PlainMap:
    """Return the map in numbers; add a PairMap's divisors and offsets to the rows."""
    if not isinstance(by, PairMap):
        return by
    readable = not torch.compiler.is_compiling()  # values can be compared
    same = (n for n, x in enumerate(rows) if x is by or (readable and x.same_row(by)))
    row = next(same, len(rows))
    if row == len(rows):
        rows.append(by)
    return PairRow(by.modulus, by.floor, row)


def _table(name: str, rows: list[PairMap]) -> Tensor:
    pairs = [len(x.divisor) for x in rows]
    if len({*pairs}) > 1:
        raise ValueError(f"{name}: PairMaps must be of the same pairs, got {pairs}")
    return torch.stack([torch.stack((x.divisor, x.offset)) for x in rows])
