"""Sharding rules for DTensors in the ops of the rotation and of attention.

A rule lists, for one dimension of a mesh, the shardings of an op's arguments under which every
rank computes its own part; DTensor takes the cheapest. They shard batch and heads, and for the
rotation the sequence, if every token's own position is given. For attention over a sharded
sequence use the functions of this package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..ops._shared.library import ops

# Which of an op's first arguments are rows of tokens, and which are log-sum-exps.
_ROWS = {
    **{"rope_fwd": 2, "rope_bwd": 4, "attention_fwd": 3, "attention_bwd": 7},
    **{"rope_norm_fwd": 2, "rope_norm_bwd": 4},
}
_NUMBERS = {"attention_bwd": (1, 6)}
_OUTPUTS = {
    **{"rope_fwd": 2, "rope_bwd": 3, "attention_fwd": 2, "attention_bwd": 3},
    **{"rope_norm_fwd": 2, "rope_norm_bwd": 4},
}
Placements = list[Any]


def register() -> None:
    """Register the rules of all ops, for every backend."""
    for name in _ROWS:
        suffixes = ("", "_triton", "_flash_attn") if "attention" in name else ("", "_triton")
        overloads = [getattr(ops, name + suffix).default for suffix in suffixes]
        register_sharding(overloads)(_rule(name))


def _rule(name: str) -> Callable[..., list[tuple[Placements, Placements]]]:
    count = _ROWS[name]

    def acceptable(*args: Any, **options: Any) -> list[tuple[Placements, Placements]]:
        args = (*args, *[None] * (count - len(args)))
        rows, others = args[:count], args[count:]
        found = [([Replicate()] * _OUTPUTS[name], _whole(args))]
        of_others = _attention_args
        if name.startswith("rope"):
            of_others = _norm_args if "norm" in name else _rope_args
        for what in ("batch", "heads", "sequence"):
            rest = of_others(what, rows, others)
            if rest is None or not _divides(what, rows):
                continue
            dim = _dim(what, rows[0])
            given = [None if x is None else Shard(dim) for x in rows]
            for n in _NUMBERS.get(name, ()):
                given[n] = rows[n] and Shard(_of_numbers(what, rows[0]))
            found.append((_outputs(name, what, rows, others), [*given, *rest]))
        return found

    return acceptable


def _whole(args: tuple[Any, ...]) -> Placements:
    """Replicate every tensor; numbers are None."""
    return [Replicate() if hasattr(x, "ndim") else None for x in args]


def _dim(what: str, rows: Any) -> int:
    """Return a dim of (batch, seqlen, heads, head_dim) or, packed, (total, heads, head_dim)."""
    return rows.ndim - 2 if what == "heads" else {"batch": 0, "sequence": 1}[what]


def _of_numbers(what: str, rows: Any) -> int:
    """Return a dim of (batch, heads, seqlen) or, packed, (heads, total)."""
    return rows.ndim - 3 if what == "heads" else 0


def _divides(what: str, rows: tuple[Any, ...]) -> bool:
    """Return True if heads can be cut so that queries stay with their keys."""
    if what != "heads":
        return True
    heads = [x.shape[-2] for x in rows if x is not None]  # log-sum-exps have them there too
    sizes = list(rows[0].mesh.shape)
    for count in range(1, len(sizes) + 1):
        for some in itertools.combinations(sizes, count):
            ranks = math.prod(some)
            # DTensor itself never cuts fewer heads than there are ranks.
            if any(n % ranks and n >= ranks for n in heads):
                return False
    return True


def _rope_args(what: str, rows: tuple[Any, ...], args: tuple[Any, ...]) -> Placements | None:
    """Place inv_freq, positions, cu_seqlens, log_decay and axes, as far as they are given."""
    inv_freq, positions, cu_seqlens, *_ = (*args, None, None)
    q, packed = rows[0], rows[0].ndim == 3
    if what != "heads" and (packed or cu_seqlens is not None):
        return None
    found = _whole(args)
    if what == "heads":
        if _per_head(inv_freq):
            found[0] = Shard(1)
        return found
    if what == "batch":
        if inv_freq.ndim > 1 and inv_freq.shape[0] > 1:
            found[0] = Shard(0)
        if positions is not None:
            by_token = positions.ndim == 1 and positions.shape[0] == q.shape[1]
            if positions.ndim == 1 and 1 < q.shape[1] < positions.shape[0]:
                return None  # as many sequences as tokens: a rank would read them by token
            dim = 1 if positions.ndim == 3 else 0
            if not by_token and positions.shape[dim] > 1:
                found[1] = Shard(dim)
        return found
    if positions is None or positions.shape[-1] != q.shape[1]:
        return None
    found[1] = Shard(positions.ndim - 1)
    return found


def _norm_args(what: str, rows: tuple[Any, ...], args: tuple[Any, ...]) -> Placements | None:
    """Place the norm weights of q and k, whole for a norm over all heads, then `_rope_args`."""
    weights, rest = args[:2], _rope_args(what, rows, args[2:])
    over_heads = any(x is not None and x.shape[0] != rows[0].shape[-1] for x in weights)
    if rest is None or (what == "heads" and over_heads):
        return None
    return [*_whole(weights), *rest]


def _attention_args(what: str, rows: tuple[Any, ...], args: tuple[Any, ...]) -> Placements | None:
    """Place inv_freq, cu_seqlens, log_decay, sinks, query_scale, pair_maps, starts, if given."""
    if what == "sequence" or (what == "batch" and rows[0].ndim == 3):
        return None
    found = _whole(args)
    for n, x in enumerate(args):
        if not hasattr(x, "ndim"):
            continue
        if what == "heads":
            found[n] = _by_heads(n, x)
        elif ((n in (0, 4) and x.ndim > 1) or n > 5) and x.shape[0] > 1:
            found[n] = Shard(0)
    return found


def _by_heads(n: int, x: Any) -> Any:
    """Shard the n-th argument if heads are cut: sinks, and frequencies and maps of heads."""
    if n == 3:
        return Shard(0)
    if n == 0 and _per_head(x):
        return Shard(1)
    return Shard(2) if n == 5 and x.shape[2] > 1 else Replicate()


def _outputs(name: str, what: str, rows: tuple[Any, ...], others: tuple[Any, ...]) -> Placements:
    dim = Shard(_dim(what, rows[0]))
    if name == "attention_fwd":
        return [dim, Shard(_of_numbers(what, rows[0]))]
    if name == "attention_bwd":
        return [dim] * 3
    of_k = Replicate() if rows[1] is None else dim
    if name in ("rope_fwd", "rope_norm_fwd"):
        return [dim, of_k]
    if name == "rope_norm_bwd":
        return [dim, of_k, *(Replicate() if x is None else Partial() for x in others[:2])]
    angles = {"batch": Shard(0), "sequence": Shard(1), "heads": Partial()}[what]
    if what == "heads" and _per_head(others[0]):
        angles = Shard(2)
    return [dim, of_k, Replicate() if rows[2] is None else angles]


def _per_head(inv_freq: Any) -> bool:
    return inv_freq.ndim == 3 and inv_freq.shape[1] > 1


register()
