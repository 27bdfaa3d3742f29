"""Errors of PermuteFormer's functions: each names the function and the argument."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._tables import specs
from .._tables.checks import check_boundaries, has_values
from .._tables.specs import ANY, DENSE, FLOATS, INT32, ROWS, WIDE, Spec
from .._torch.layouts import once_per_layout
from .permutations import Powers

MAX_DIM = 256  # attention's limit, except the reference's: a state must fit on chip
MAX_PERMUTED_DIM = 1024  # as kMaxPermutedDim in csrc/cpu/permute/kernel.h


@once_per_layout
def check_powers(
    name: str,
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check q, k (or q alone), their permutations and positions."""
    tensors = (q, k, cu_seqlens, permutations, positions)
    sizes = specs.check(name, _table_of_powers(cu_seqlens is not None), tensors)
    head_dim, heads, rows = sizes["head_dim"], sizes["heads_q"], sizes["rows"]
    if not 1 <= head_dim <= MAX_PERMUTED_DIM:
        raise ValueError(f"{name}: head_dim must be from 1 to {MAX_PERMUTED_DIM}, got {head_dim}")
    if rows == 0 or heads % rows:
        raise ValueError(
            f"{name}: permutations must have rows that divide q's {heads} heads, got {rows}"
        )
    if sizes.get("heads_k", rows) != rows:
        raise ValueError(
            f"{name}: permutations must have a row for each of the {sizes['heads_k']} k heads, "
            f"got {rows} rows"
        )


@functools.cache
def _table_of_powers(packed: bool) -> tuple[Spec, ...]:
    tokens, sequences = ("total", "sequences") if packed else ("batch seqlen", "batch")
    batch, seqlen = ("1", "total") if packed else ("1|batch", "seqlen")
    places = f"{seqlen} or {batch} {seqlen} or {sequences} or {sequences} 1"
    return (
        Spec("q", f"{tokens} heads_q head_dim", ROWS),
        Spec("k", f"{tokens} heads_k head_dim", optional=True),
        Spec("cu_seqlens", "sequences+1", INT32, optional=True, strides=DENSE),
        Spec("permutations", "rows head_dim", (torch.int64,)),
        Spec("positions", places, (torch.int32, torch.int64), optional=True, strides=ANY),
    )


@once_per_layout
def check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool = True,
    results: tuple[Tensor | None, ...] = (),
) -> None:
    """Check the arguments of attention except permutations and positions.

    results: for a backward dout, and out and den if they were normalized.
    """
    table, tensors = _table(cu_seqlens is not None), (q, k, v, cu_seqlens, decay, *results)
    sizes = specs.check(name, table[: len(tensors)], tensors)
    heads_q, heads_k = sizes["heads_q"], sizes["heads_k"]
    if heads_k == 0 or heads_q == 0 or heads_q % heads_k:
        raise ValueError(f"{name}: k's heads must divide q's {heads_q} heads, got {heads_k}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"{name}: head_dim must be at least 1, got {q.shape[-1]}, {v.shape[-1]}")
    if decay is not None and not causal:
        raise ValueError(f"{name}: decay must be None with causal=False, got a Tensor")


@functools.cache
def _table(packed: bool) -> tuple[Spec, ...]:
    tokens = "total" if packed else "batch seqlen"
    return (
        Spec("q", f"{tokens} heads_q head_dim", ROWS),
        Spec("k", f"{tokens} heads_k head_dim"),
        Spec("v", f"{tokens} heads_k head_dim_v"),
        Spec("cu_seqlens", "sequences+1", INT32, optional=True, strides=DENSE),
        Spec("decay", "heads_k or heads_q", FLOATS, optional=True, strides=ANY),
        Spec("dout", f"{tokens} heads_q head_dim_v", (WIDE,)),
        Spec("out", f"{tokens} heads_q head_dim_v", (WIDE,), optional=True),
        Spec("den", "heads_q total" if packed else "batch heads_q seqlen", (WIDE,), optional=True),
    )


def check_dims(name: str, q: Tensor, v: Tensor) -> None:
    """Refuse heads with more than MAX_DIM dims."""
    for label, x in (("head_dim", q), ("v's head_dim", v)):
        if x.shape[-1] > MAX_DIM:
            raise ValueError(
                f"{name}: {label} must be at most {MAX_DIM} (backend='reference' takes any), "
                f"got {x.shape[-1]}"
            )


@once_per_layout
def check_state(name: str, state: Tensor, key_sum: Tensor, k: Tensor, v: Tensor, heads: int):
    """Check that a state of `heads` heads fits k and v."""
    of_k = {"batch": k.shape[0], "heads": heads, "head_dim": k.shape[-1]}
    sizes = {word: (n, "k") for word, n in of_k.items()} | {"head_dim_v": (v.shape[-1], "v")}
    specs.check(name, _STATE, (state, key_sum), sizes, ("k", k))


_STATE = (
    Spec("state.kv", "batch heads head_dim head_dim_v", (WIDE,), strides=DENSE),
    Spec("state.k", "batch heads head_dim", (WIDE,), strides=DENSE),
)


def check_values(
    name: str, tokens: int, powers: Powers | None = None, decay: Tensor | None = None
) -> None:
    """Check the values of integers and decays, on the CPU only: on a GPU it would wait."""
    permutations, _, cu_seqlens, _ = powers or Powers(None)
    if permutations is not None and has_values(permutations):
        dim = permutations.shape[-1]
        wrong = (permutations.sort(-1).values != torch.arange(dim, device="cpu")).any(-1)
        if wrong.any():
            raise ValueError(
                f"{name}: permutations must hold 0 to {dim - 1} once in every row, "
                f"row {wrong.nonzero()[0].item()} does not"
            )
    if cu_seqlens is not None:
        check_boundaries(name, cu_seqlens, tokens)
    if decay is not None and has_values(decay):
        values = decay.tolist()
        if not all(0 < value <= 1 for value in values):
            raise ValueError(f"{name}: decay must lie in (0, 1], got {values}")
