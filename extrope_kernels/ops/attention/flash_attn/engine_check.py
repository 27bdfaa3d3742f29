"""Check on a few tokens that an engine computes what it should, before its first use.

Queries and keys of ones make every visible logit 1: weights, lse and gradients are then known
without a second implementation. The backward gets an lse and an out from elsewhere, as in the
composition, which passes those over all keys.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .engines import ENGINES, Engine, why_not

_LENGTHS = (2, 7)  # of packed sequences; only the second one is used unpacked
_WINDOW = 3
_SHIFTED_LENGTHS = (2, 700)  # the first is shorter than the shift,
_SHIFT = 300  # by which all queries of the second's first tile see no key
_DLSE = 4.0
_TOLERANCE = 2e-2  # bfloat16 keeps 8 bits; a wrong mask, base or delta is off by far more
Bounds = tuple[int | None, int]  # left and right of a band


class Kind(NamedTuple):
    """Properties that select the kernels of a call; flash-attn 4 compiles them for each kind."""

    dtype: torch.dtype
    head_dim: int
    group: int  # heads of q per head of k
    packed: bool


@dataclass(frozen=True)
class Findings:
    """The way to use an engine: lse_unit times its lse is the natural logarithm."""

    lse_unit: float
    negative_right: bool


def kind_of(q: Tensor, v: Tensor) -> Kind:
    """Return the kind of a call with q and v."""
    group = q.shape[-2] // max(1, v.shape[-2])
    return Kind(q.dtype, q.shape[-1], group, packed=q.dim() == 3)


def best_engine(q: Tensor, v: Tensor) -> Engine:
    """Return the newest installed engine that takes such calls and computes them rightly here."""
    if not q.is_cuda:
        raise NotImplementedError(f"flash_attn: q must be on a CUDA GPU, got {q.device}")
    reasons = []
    for engine in ENGINES:
        why = unusable(engine, q.device, kind_of(q, v))
        if why is None:
            return engine
        reasons.append(why)
    raise NotImplementedError("flash_attn: " + "; ".join(reasons))


def unusable(engine: Engine, device: torch.device, kind: Kind) -> str | None:
    """Return, in a line, why an engine cannot run such calls on this machine; None if it can."""
    why = why_not(engine, torch.cuda.get_device_capability(device), kind.head_dim)
    found = why or _findings(engine, device, kind)
    return found if isinstance(found, str) else None


def examine(engine: Engine, q: Tensor, v: Tensor) -> Findings:
    """Return the findings on an engine; NotImplementedError if it cannot be used on q and v."""
    findings = _findings(engine, q.device, kind_of(q, v))
    if isinstance(findings, str):
        raise NotImplementedError(f"flash_attn: {findings}")
    return findings


@functools.cache
def _findings(engine: Engine, device: torch.device, kind: Kind) -> Findings | str:
    """Probe an engine, or return why it cannot be used. The first call synchronises."""
    lengths = _LENGTHS if kind.packed else _LENGTHS[1:]
    try:
        units = [_probe(engine, device, kind, lengths, (left, 0)) for left in (None, _WINDOW - 1)]
    except NotImplementedError as error:
        return str(error)
    if units[0] != units[1]:
        return f"{engine.name} changes the base of its lse: units {units}"
    shifts = kind.packed and engine.negative_right
    return Findings(units[0], shifts and _takes_negative_right(engine, device, kind))


def _takes_negative_right(engine: Engine, device: torch.device, kind: Kind) -> bool:
    try:
        _probe(engine, device, kind, _SHIFTED_LENGTHS, (None, -_SHIFT))
    except NotImplementedError:
        return False
    return True


def _probe(
    engine: Engine, device: torch.device, kind: Kind, lengths: tuple[int, ...], bounds: Bounds
) -> float:
    """Compare a forward and a backward with the expected results; return the unit of lse."""
    try:
        return _compare(engine, device, kind, lengths, bounds)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # kernel compilers raise errors of any class
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotImplementedError(
            f"{engine.name} does not take the calls made here: {why}"
        ) from error


def _compare(
    engine: Engine, device: torch.device, kind: Kind, lengths: tuple[int, ...], bounds: Bounds
) -> float:
    (dtype, head_dim, group, packed), total = kind, sum(lengths)
    visible = _visible(lengths, *bounds)
    count = visible.sum(1)
    values = torch.arange(total, dtype=torch.float64, device="cpu")

    def rows(x: Tensor, heads: int) -> Tensor:
        """Expand x (total,) to every head and dim."""
        spread = x.to(device, dtype)[:, None, None].expand(total, heads, head_dim).contiguous()
        return spread if packed else spread[None]

    def each(x: Tensor) -> Tensor:
        """Return the value per row and head: (total, heads)."""
        return x.reshape(total, -1, head_dim)[..., 0]

    cu_seqlens = torch.tensor((0, *lengths), device="cpu").cumsum(0).to(device, torch.int32)
    band = (1.0 / head_dim, *bounds, cu_seqlens if packed else None, 0.0)
    ones = torch.ones_like(values)
    q, k, v = rows(ones, group), rows(ones, 1), rows(values, 1)
    out, lse = engine.forward(q, k, v, *band)
    expected = (1.0 + torch.log(count.double())).to(lse.device)
    unit = _unit(engine, lse.reshape(group, total), expected)
    weights = visible / count.clamp(min=1)[:, None]
    _expect(engine, "out", each(out)[count > 0], (weights @ values)[count > 0])

    # As if other keys raised lse by ln 2: every weight halves. An out of 0 makes delta 0. Rows
    # without keys here have some elsewhere. A gradient of lse acts like larger values.
    wider = expected.masked_fill(expected == -torch.inf, 0.0) + math.log(2.0)
    wider = (wider / unit).to(lse.dtype).expand(lse.shape).contiguous()
    dout, zeros = rows(ones / head_dim, group), rows(torch.zeros_like(values), group)
    dlse = torch.full_like(wider, _DLSE) if engine.takes_dlse else None
    dq, dk, dv = engine.backward(dout, dlse, q, k, v, zeros, wider, *band)
    weights, raised = weights / 2, values if dlse is None else values + _DLSE
    of_keys = weights.sum(0) * group
    _expect(engine, "dq", each(dq) * head_dim, weights @ raised)
    _expect(engine, "dk", each(dk) * head_dim, of_keys * raised)
    _expect(engine, "dv", each(dv) * head_dim, of_keys)
    return unit


def _visible(lengths: tuple[int, ...], left: int | None, right: int) -> Tensor:
    """Return (total, total) float64: 1 if the row's query sees the column's key, else 0."""
    blocks = []
    for length in lengths:
        block = torch.ones(length, length, dtype=torch.float64, device="cpu").tril(right)
        blocks.append(block if left is None else block.triu(-left))
    return torch.block_diag(*blocks)


def _unit(engine: Engine, lse: Tensor, expected: Tensor) -> float:
    """Return 1 for natural logarithms, ln 2 for base 2."""
    for unit in (1.0, math.log(2.0)):
        if torch.allclose(lse.double() * unit, expected.expand(lse.shape), rtol=1e-3):
            return unit
    raise NotImplementedError(
        f"{engine.name} gives lse neither in base e nor in base 2: "
        f"{lse.tolist()} for {expected.tolist()}"
    )


def _expect(engine: Engine, name: str, got: Tensor, expected: Tensor) -> None:
    """Compare (rows, heads) with the expected value of every head."""
    expected = expected[:, None].expand(got.shape)
    if not torch.allclose(got.double().cpu(), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise NotImplementedError(
            f"{engine.name} gives a wrong {name}: {got.tolist()} for {expected.tolist()}"
        )
