"""PermuteFormer's attention on the CPU, by the compiled kernels (csrc/cpu/linear_attention).

The kernels have one operation, the chunkwise scan:

    out_i = q_scale_i sum_j decay**|i - j| k_scale_j (<q_i, k_j> + q_extra_i k_extra_j) v_j

over j <= i (causal), j >= i (causal, reverse), or all j. The forward scans (q, k, v), permuted
while they are read; dq, dk and dv are scans of (dout, v, k), (v, dout, q) and (k, q, dout). The two
ops have no fake and no gradient: the public ops wrap them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ... import _ext
from .._torch.library import library, ops
from .permutations import Powers
from .scans import Call, Result

library.define(
    "linear_scan(Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? q_extra, Tensor? k_scale, "
    "Tensor? k_extra, Tensor? gate, Tensor? decay, Tensor? cu_seqlens, Tensor? first_state, "
    "Tensor? first_sum, Tensor? permutations, Tensor? positions, int offset, int heads, "
    "bool phi_scores, bool causal, bool reverse, bool normalize, bool out_is_float, "
    "bool keep_state) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define("row_dots(Tensor q, Tensor k, bool packed) -> Tensor")


@dataclass(frozen=True)
class _Extras:
    """Arguments of the scans of gradients, beside a Call.

    Scales and extras are float32 (batch, heads of q or k, seqlen), or None for ones, and for no
    extra term.
    """

    reverse: bool = False
    phi_scores: bool = True  # phi is applied to q and k; else to v
    q_scale: Tensor | None = None
    q_extra: Tensor | None = None
    k_scale: Tensor | None = None
    k_extra: Tensor | None = None
    gate: Tensor | None = None  # like out: out counts as 0 where gate <= 0, not where it is NaN
    out_is_float: bool = False  # out in float32; else in q's dtype


_FORWARD = _Extras(out_is_float=True)
_NOT_PERMUTED = Powers(None)


def forward(q: Tensor, k: Tensor, v: Tensor, powers: Powers, call: Call) -> Result:
    """Compute out and den for float32, bfloat16 or float16, summed in float32."""
    return _scan(q, k, v, call, _FORWARD, powers)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    den: Tensor | None,
    powers: Powers,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv.

    The normaliser is the sum over one more dim of v, of ones: its gradient, -<dout_i, out_i> over
    the sum of scores, is the extra term. Queries and keys are permuted in memory.
    """
    at = powers.permutations, powers.positions, powers.cu_seqlens
    q, k = ops.permute_fwd(q, k, *at, offset=powers.offset)
    plain, scale, dout = replace(call, normalize=False), None, dout.to(q.dtype)
    of_rows, of_keys = {}, {}
    if call.normalize:
        _load()
        delta = -ops.row_dots(dout.float(), out, call.cu_seqlens is not None)
        scale = den.reciprocal()
        of_rows = {"q_scale": scale, "q_extra": delta}
        of_keys = {"k_scale": scale, "k_extra": delta}
    dq = _scan(dout, v, k, plain, _Extras(phi_scores=False, gate=q, **of_rows)).out
    back = _Extras(reverse=True, out_is_float=call.heads > k.shape[-2])
    dk = _scan(v, dout, q, plain, replace(back, phi_scores=False, gate=k, **of_keys)).out
    dv = _scan(k, q, dout, plain, replace(back, k_scale=scale)).out
    dk, dv = _per_key_head(dk, k), _per_key_head(dv, v)
    dq, dk = ops.permute_fwd(dq, dk, *at, offset=powers.offset, inverse=True)
    return dq, dk, dv


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    extras: _Extras,
    powers: Powers = _NOT_PERMUTED,
) -> Result:
    _load()
    decay = None if call.decay is None else call.decay.float().contiguous()
    return Result(
        *ops.linear_scan(
            q, k, v, extras.q_scale, extras.q_extra, extras.k_scale, extras.k_extra, extras.gate,
            decay, call.cu_seqlens, call.kv, call.key_sum, powers.permutations, powers.positions,
            powers.offset, call.heads, extras.phi_scores, call.causal, extras.reverse,
            call.normalize, extras.out_is_float, call.keep_state,
        )
    )  # fmt: skip


def _per_key_head(x: Tensor, like: Tensor) -> Tensor:
    """Sum the contributions of the states that share a head of k."""
    if x.shape[-2] == like.shape[-2]:
        return x
    return x.unflatten(-2, (like.shape[-2], -1)).sum(-2).to(like.dtype)


def _load() -> None:
    if (reason := _ext.load("cpu")) is not None:
        raise RuntimeError(f"permuteformer: the CPU library cannot be used: {reason}")
