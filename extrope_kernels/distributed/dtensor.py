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

from ..ops._torch.library import ALL_BACKENDS, ops

_OUTPUTS = {
    **{"rope_fwd": 2, "rope_bwd": 3, "attention_fwd": 2, "attention_bwd": 3},
    **{"rope_norm_fwd": 2, "rope_norm_bwd": 4},
}
_LSES = ("dlse", "lse")  # of the arguments that have rows of tokens
Placements = list[Any]
Args = dict[str, Any]  # an op's tensors by the names of its schema, or their placements


def register() -> None:
    """Register the rules of all ops, for every backend."""
    for name in _OUTPUTS:
        own = [f"{name}_{x}" for x, backend in ALL_BACKENDS.items() if backend.has_ops]
        overloads = [getattr(ops, x).default for x in (name, *own) if hasattr(ops, x)]
        register_sharding(overloads)(_rule(name))


def _rule(name: str) -> Callable[..., list[tuple[Placements, Placements]]]:
    schema = getattr(ops, name).default._schema
    names = [x.name for x in schema.arguments if not x.kwarg_only]
    # The first arguments have rows of tokens.
    count = names.index("q_norm_weight" if "norm" in name else "inv_freq")

    def acceptable(*args: Any, **options: Any) -> list[tuple[Placements, Placements]]:
        # Arguments that have their defaults may be missing.
        given = dict(zip(names, args))
        rows = {x: given.pop(x, None) for x in names[:count]}
        whole = {**_whole(rows), **_whole(given)}
        found = [([Replicate()] * _OUTPUTS[name], [*whole.values()])]
        of_others = _attention_args
        if name.startswith("rope"):
            of_others = _norm_args if "norm" in name else _rope_args
        first = next(iter(rows.values()))
        for what in ("batch", "heads", "sequence"):
            rest = of_others(what, first, given)
            if rest is None or not _divides(what, rows):
                continue
            of_rows = {x: None if y is None else Shard(_dim(what, first)) for x, y in rows.items()}
            for x in _LSES:
                if rows.get(x) is not None:
                    of_rows[x] = Shard(_of_numbers(what, first))
            found.append((_outputs(name, what, rows, given), [*of_rows.values(), *rest.values()]))
        return found

    return acceptable


def _whole(args: Args) -> Args:
    """Replicate every tensor; numbers are None."""
    return {name: Replicate() if hasattr(x, "ndim") else None for name, x in args.items()}


def _dim(what: str, rows: Any) -> int:
    """Return a dim of (batch, seqlen, heads, head_dim) or, packed, (total, heads, head_dim)."""
    return rows.ndim - 2 if what == "heads" else {"batch": 0, "sequence": 1}[what]


def _of_numbers(what: str, rows: Any) -> int:
    """Return a dim of (batch, heads, seqlen) or, packed, (heads, total)."""
    return rows.ndim - 3 if what == "heads" else 0


def _divides(what: str, rows: Args) -> bool:
    """Return True if heads can be cut so that queries stay with their keys."""
    if what != "heads":
        return True
    given = [x for x in rows.values() if x is not None]
    heads = [x.shape[-2] for x in given]  # log-sum-exps have them there too
    sizes = list(given[0].mesh.shape)
    for count in range(1, len(sizes) + 1):
        for some in itertools.combinations(sizes, count):
            ranks = math.prod(some)
            # DTensor itself never cuts fewer heads than there are ranks.
            if any(n % ranks and n >= ranks for n in heads):
                return False
    return True


def _rope_args(what: str, q: Any, args: Args) -> Args | None:
    """Place inv_freq, positions, cu_seqlens, log_decay and axes, as far as they are given."""
    inv_freq, positions = args["inv_freq"], args.get("positions")
    if what != "heads" and (q.ndim == 3 or args.get("cu_seqlens") is not None):
        return None
    found = _whole(args)
    if what == "heads":
        if _per_head(inv_freq):
            found["inv_freq"] = Shard(1)
        return found
    if what == "batch":
        if inv_freq.ndim > 1 and inv_freq.shape[0] > 1:
            found["inv_freq"] = Shard(0)
        if positions is not None:
            by_token = positions.ndim == 1 and positions.shape[0] == q.shape[1]
            if positions.ndim == 1 and 1 < q.shape[1] < positions.shape[0]:
                return None  # as many sequences as tokens: a rank would read them by token
            dim = 1 if positions.ndim == 3 else 0
            if not by_token and positions.shape[dim] > 1:
                found["positions"] = Shard(dim)
        return found
    if positions is None or positions.shape[-1] != q.shape[1]:
        return None
    found["positions"] = Shard(positions.ndim - 1)
    return found


def _norm_args(what: str, q: Any, args: Args) -> Args | None:
    """Place the norm weights of q and k, whole for a norm over all heads, and `_rope_args`."""
    weights = (args["q_norm_weight"], args["k_norm_weight"])
    over_heads = any(x is not None and x.shape[0] != q.shape[-1] for x in weights)
    return None if what == "heads" and over_heads else _rope_args(what, q, args)


def _attention_args(what: str, q: Any, args: Args) -> Args | None:
    """Place the tensors of a call as far as they are given."""
    if what == "sequence" or (what == "batch" and q.ndim == 3):
        return None
    found = _whole(args)
    inv_freq, scale = args["inv_freq"], args["query_scale"]
    if what == "heads":
        if args["sinks"] is not None:
            found["sinks"] = Shard(0)
        if _per_head(inv_freq):
            found["inv_freq"] = Shard(1)
        return found
    of_sequences = {"q_start": args["q_start"], "k_start": args["k_start"]}
    if inv_freq.ndim > 1:
        of_sequences["inv_freq"] = inv_freq
    if scale is not None and scale.ndim > 1:
        of_sequences["query_scale"] = scale
    for name, x in of_sequences.items():
        if x is not None and x.shape[0] > 1:
            found[name] = Shard(0)
    return found


def _outputs(name: str, what: str, rows: Args, others: Args) -> Placements:
    first, *more = rows.values()
    dim = Shard(_dim(what, first))
    if name == "attention_fwd":
        return [dim, Shard(_of_numbers(what, first))]
    if name == "attention_bwd":
        return [dim] * 3
    of_k = Replicate() if more[0] is None else dim
    if name in ("rope_fwd", "rope_norm_fwd"):
        return [dim, of_k]
    if name == "rope_norm_bwd":
        weights = (others["q_norm_weight"], others["k_norm_weight"])
        return [dim, of_k, *(Replicate() if x is None else Partial() for x in weights)]
    angles = {"batch": Shard(0), "sequence": Shard(1), "heads": Partial()}[what]
    if what == "heads" and _per_head(others["inv_freq"]):
        angles = Shard(2)
    return [dim, of_k, Replicate() if rows["q"] is None else angles]


def _per_head(inv_freq: Any) -> bool:
    return inv_freq.ndim == 3 and inv_freq.shape[1] > 1


register()
