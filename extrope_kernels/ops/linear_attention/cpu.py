"""Scans on the CPU, by the compiled kernels (csrc/cpu/linear_attention).

The two core ops have no fake and no gradient of their own: the public ops wrap them.
"""

from __future__ import annotations

from torch import Tensor

from ... import _ext
from .._shared.library import library, ops
from .scan import Scan, Scanned

library.define(
    "linear_scan(Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? q_extra, Tensor? k_scale, "
    "Tensor? k_extra, Tensor? gate, Tensor? decay, Tensor? cu_seqlens, Tensor? first_state, "
    "Tensor? first_sum, Tensor? permutations, Tensor? positions, int offset, int heads, "
    "bool phi_scores, bool causal, bool reverse, bool normalize, bool out_is_float, "
    "bool keep_state) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define("row_dots(Tensor q, Tensor k, bool packed) -> Tensor")


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Scan,
    permutations: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
) -> Scanned:
    """See scan.py; float32, bfloat16 or float16, accumulated in float32.

    With permutations q and k are permuted first, as by `permute`.
    """
    _load()
    return Scanned(
        *ops.linear_scan(
            q, k, v, how.q_scale, how.q_extra, how.k_scale, how.k_extra, how.gate,
            None if how.decay is None else how.decay.float().contiguous(), how.cu_seqlens,
            how.first_state, how.first_sum, permutations, positions, offset, how.heads,
            how.phi_scores, how.causal, how.reverse, how.normalize, how.out_is_float,
            how.keep_state,
        )
    )  # fmt: skip


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total), float32."""
    _load()
    return ops.row_dots(x, y, packed)


def _load() -> None:
    if (reason := _ext.load("cpu")) is not None:
        raise RuntimeError(f"linear_attn: the CPU library cannot be used: {reason}")
