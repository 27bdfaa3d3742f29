"""What an engine really does, found out on a few tokens before it is first trusted.

Queries and keys of ones make every visible logit 1, so that weights, lse and gradients are known
without a second implementation. The backward is given a foreign lse and a foreign out, as the
composition gives it those of all keys.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .engines import ENGINES, Engine, why_not

_LENGTHS = (2, 7)  # of the packed probe: the first is shorter than its shift
_WINDOW = 3
_SHIFT = 3
_TOLERANCE = 2e-2  # bfloat16 keeps 8 bits; a wrong mask, base or delta is off by far more


@dataclass(frozen=True)
class Findings:
    """How to use an engine: lse_unit times its lse is the natural logarithm."""

    lse_unit: float
    negative_right: bool


def best_engine(q: Tensor) -> Engine:
    """The newest engine that is installed, takes q, and does what it should on this machine."""
    if not q.is_cuda:
        raise NotImplementedError(f"flash_attn: q must be on a CUDA GPU, got {q.device}")
    reasons = []
    for engine in ENGINES:
        why = unusable(engine, q.device, q.dtype, q.shape[-1])
        if why is None:
            return engine
        reasons.append(why)
    raise NotImplementedError("flash_attn: " + "; ".join(reasons))


def unusable(engine: Engine, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why an engine cannot be used on such tensors of this machine, in a line; None when it can."""
    why = why_not(engine, torch.cuda.get_device_capability(device), head_dim)
    found = why or _findings(engine, device, dtype, head_dim)
    return found if isinstance(found, str) else None


def examine(engine: Engine, q: Tensor) -> Findings:
    """What is known of an engine; NotImplementedError when it cannot be used on tensors like q."""
    findings = _findings(engine, q.device, q.dtype, q.shape[-1])
    if isinstance(findings, str):
        raise NotImplementedError(f"flash_attn: {findings}")
    return findings


@functools.cache
def _findings(
    engine: Engine, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Findings | str:
    """Probe an engine, or say why it cannot be used. The first call synchronises."""
    like = torch.empty(0, 1, head_dim, device=device, dtype=dtype)
    try:
        return _probe_all(engine, like)
    except NotImplementedError as error:
        return str(error)


def _probe_all(engine: Engine, like: Tensor) -> Findings:
    units = [
        _probe(engine, like, None, 0, packed=False),
        _probe(engine, like, _WINDOW - 1, 0, packed=False),
        _probe(engine, like, _WINDOW - 1, 0, packed=True),
    ]
    if len(set(units)) > 1:
        raise NotImplementedError(f"{engine.name} changes the base of its lse: units {units}")
    return Findings(units[0], engine.negative_right and _takes_negative_right(engine, like))


def _takes_negative_right(engine: Engine, like: Tensor) -> bool:
    try:
        _probe(engine, like, None, -_SHIFT, packed=True)
    except NotImplementedError:
        return False
    return True


def _probe(engine: Engine, like: Tensor, left: int | None, right: int, packed: bool) -> float:
    """Compare one forward and one backward with what they must give; return the unit of lse."""
    try:
        return _compare(engine, like, left, right, packed)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # compilers of kernels have errors of their own
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotImplementedError(
            f"{engine.name} does not take the calls made here: {why}"
        ) from error


def _compare(engine: Engine, like: Tensor, left: int | None, right: int, packed: bool) -> float:
    lengths = _LENGTHS if packed else _LENGTHS[1:]
    head_dim, total = like.shape[-1], sum(lengths)
    visible = _visible(lengths, left, right)
    count = visible.sum(1)
    values = torch.arange(total).double()

    def rows(x: Tensor) -> Tensor:
        """(total,) as a tensor of one head that holds x in every dim."""
        spread = x.to(like)[:, None, None].expand(total, 1, head_dim).contiguous()
        return spread if packed else spread[None]

    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(like.device, torch.int32)
    band = (1.0 / head_dim, left, right, cu_seqlens if packed else None, 0.0)
    q = rows(torch.ones(total))
    out, lse = engine.forward(q, q, rows(values), *band)
    expected = (1.0 + torch.log(count.double())).to(lse.device)
    unit = _unit(engine, lse.flatten(), expected)
    weights = visible / count.clamp(min=1)[:, None]
    _expect(engine, "out", out[..., 0].flatten()[count > 0], (weights @ values)[count > 0])

    # An lse larger by ln 2, as other keys would make it, halves every weight; an out of 0 leaves
    # delta 0. Rows without keys here have some elsewhere.
    wider = expected.masked_fill(expected == -torch.inf, 0.0) + math.log(2.0)
    wider = (wider / unit).to(lse.dtype).view_as(lse)
    dout, zeros = rows(torch.full((total,), 1.0 / head_dim)), rows(torch.zeros(total))
    dq, dk, dv = engine.backward(dout, None, q, q, rows(values), zeros, wider, *band)
    weights = weights / 2
    _expect(engine, "dq", dq[..., 0].flatten() * head_dim, weights @ values)
    _expect(engine, "dk", dk[..., 0].flatten() * head_dim, weights.sum(0) * values)
    _expect(engine, "dv", dv[..., 0].flatten() * head_dim, weights.sum(0))
    return unit


def _visible(lengths: tuple[int, ...], left: int | None, right: int) -> Tensor:
    """(total, total) float64: 1 where the query of the row sees the key of the column."""
    blocks = []
    for length in lengths:
        block = torch.ones(length, length, dtype=torch.float64).tril(right)
        blocks.append(block if left is None else block.triu(-left))
    return torch.block_diag(*blocks)


def _unit(engine: Engine, lse: Tensor, expected: Tensor) -> float:
    """1 for natural logarithms, ln 2 for base 2."""
    for unit in (1.0, math.log(2.0)):
        if torch.allclose(lse.double() * unit, expected, rtol=1e-3):
            return unit
    raise NotImplementedError(
        f"{engine.name} gives lse neither in base e nor in base 2: "
        f"{lse.tolist()} for {expected.tolist()}"
    )


def _expect(engine: Engine, name: str, got: Tensor, expected: Tensor) -> None:
    if not torch.allclose(got.double().cpu(), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise NotImplementedError(
            f"{engine.name} gives a wrong {name}: {got.tolist()} for {expected.tolist()}"
        )
