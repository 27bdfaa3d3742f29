"""PermuteFormer's attention, in one go and step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._shared import backends as _backends
from .._shared.checks import refuse_flags, run_explained, split_offset
from .._shared.library import ops
from . import reference
from .checks import check, check_decay_values, check_state
from .scan import Scan
from .state import step_with_gradients

BACKENDS = ("reference", "cpu", "triton")


class PermuteFormerState(NamedTuple):
    """All that earlier tokens leave behind; float32 (float64 for float64 inputs), contiguous.

    heads are those of decay, or of k.
    """

    kv: Tensor  # (batch, heads, head_dim, head_dim_v): sum of decay**age phi(k) v^T
    k: Tensor  # (batch, heads, head_dim): sum of decay**age phi(k)


def permuteformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    permutations: Tensor,
    decay: Tensor | None = None,
    causal: bool = True,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """PermuteFormer: linear attention whose positions are powers of permutations.

    out_i = sum_j s_ij v_j / sum_j s_ij over j <= i, with s_ij = r**(i - j) <phi(q_i)[pi^i],
    phi(k_j)[pi^j]> and phi(x) = relu(x) + 1e-3. Only powers of r within a chunk of tokens are ever
    formed, so no length overflows. Sums are float32, of chunks in order: the rounding of a row
    that sees n tokens grows with n over the length of a chunk (48 on a CPU), not with n.

    What is NaN or infinite spoils the rows that see it: of v in its dim alone. In Triton it may
    spoil rows of its chunk that do not; in float64 and with backend="reference" any row.

    q: (batch, seqlen, heads_q, head_dim), not permuted; float32, bfloat16, float16 or float64; any
        strides with a contiguous last dimension. With cu_seqlens (total, heads, head_dim).
    k: (batch, seqlen, heads_k, head_dim), heads_k a divisor of heads_q; nothing is expanded.
    v: (batch, seqlen, heads_k, head_dim_v). Dimensions of heads up to 256.
    permutations: (heads_k, head_dim) int64, as from `head_permutations`.
    decay: r, (heads_k,) or (heads_q,) in (0, 1], float32 or float64; no gradient. None for the
        authors' sigmoid(2 + 3 h / heads_k); ones for no decay. Counts tokens, whatever their
        positions. It has no meaning with causal=False, where nothing decays.
    causal: False lets every row see its whole sequence, as the authors' LRA code does.
    normalize: False leaves the denominator out, as the authors' language model does.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    positions: as in `permute`: None for 0, 1, 2, ..., an int or (batch,) to add to those, or each
        token's own.
    backend: "cpu", "triton", "reference"; None for the best on q's device. A named backend never
        falls back.

    Returns: (batch, seqlen, heads_q, head_dim_v) in q's dtype, or (total, ...). Differentiable in
        q, k and v; to any order with backend="reference".
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    Paper: https://arxiv.org/abs/2109.02377
    """
    name = "permuteformer_attention"
    refuse_flags(name, causal=causal, normalize=normalize)
    cu_seqlens = _int32(cu_seqlens)
    check(name, q, k, v, decay, cu_seqlens, causal)
    _check_choices(name, q, decay, backend)
    if causal and decay is None:
        decay = default_decay(k)
    if q.device.type == "cpu" and backend in (None, "cpu"):
        _check_permutations(name, permutations)
        rows, offset = split_offset("permute", positions)
        options = {"offset": offset, "causal": causal, "normalize": normalize}
        forward = functools.partial(ops.permuteformer_fwd, **options)
        tensors = (q, k, v, permutations, rows, decay, cu_seqlens)
        return run_explained("permute", forward, None, tensors)[0]
    q, k = _permute(name, q, k, permutations, positions, cu_seqlens, backend)
    if backend == "reference":
        heads = k.shape[-2] if decay is None else decay.shape[0]
        how = Scan(heads, decay, cu_seqlens, causal, normalize=normalize)
        return reference.scan(q, k, v, how).out
    op = _op("linear_attn_fwd", backend)
    return op(q, k, v, decay, cu_seqlens, causal=causal, normalize=normalize)[0]


def permuteformer_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: PermuteFormerState | None = None,
    *,
    permutations: Tensor,
    positions: Tensor | int | None = None,
    decay: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, PermuteFormerState]:
    """Go on from a state by seqlen tokens: a prompt without one, then a token or more at a time.

    What a sequence gives is the same, but for rounding, however it is cut. The state takes the
    place of a key/value cache and does not grow; the one that is given is left as it is.

    q, k, v, permutations, decay, normalize, backend: as in `permuteformer_attention`, not packed.
    state: None at the start, then what the last call returned.
    positions: of the first token, an int or (batch,) tensor, or (seqlen,) or (batch, seqlen) for
        each; 0 without a state, and to be given with one. Where batch and seqlen are equal, write
        (batch, 1) for those of the first tokens.

    Returns: (batch, seqlen, heads_q, head_dim_v) in q's dtype, and the state after the last token.
        Differentiable in q, k, v and the state, to first order, with v of less than 256
        dimensions; to any order with backend="reference".
    Raises: as `permuteformer_attention`.
    """
    name = "permuteformer_step"
    refuse_flags(name, normalize=normalize)
    check(name, q, k, v, decay, None)
    _check_choices(name, q, decay, backend)
    decay = default_decay(k) if decay is None else decay
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(
                f"{name}: state must be None or a PermuteFormerState, got {type(state).__name__}"
            )
        if positions is None:
            raise ValueError(f"{name}: positions must be given with a state, got None")
        check_state(name, *state, k, v, decay.shape[0])
    q, k = _permute(name, q, k, permutations, positions, None, backend)
    kv, key_sum = (None, None) if state is None else state
    if backend == "reference":
        how = Scan(
            decay.shape[0],
            decay,
            normalize=normalize,
            first_state=kv,
            first_sum=key_sum,
            keep_state=True,
        )
        scanned = reference.scan(q, k, v, how)
        return scanned.out, PermuteFormerState(scanned.state, scanned.sum)
    given = [x for x in (q, k, v, kv, key_sum) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        op = _op("linear_attn_fwd", backend)

        def attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
            return op(q, k, v, decay, normalize=False)[0]

        out, kv, key_sum = step_with_gradients(attention, q, k, v, kv, key_sum, decay, normalize)
    else:
        op = _op("linear_attn_step", backend)
        out, kv, key_sum = op(q, k, v, kv, key_sum, decay, normalize=normalize)
    return out, PermuteFormerState(kv, key_sum)


def backends() -> dict[str, str]:
    """What each backend says of itself here: "available", or why it is not."""
    return {name: _backends.missing(name) or "available" for name in BACKENDS}


def _op(name: str, backend: str | None) -> Callable[..., Any]:
    return getattr(ops, f"{name}_triton" if backend == "triton" else name)


def _permute(
    name: str,
    q: Tensor,
    k: Tensor,
    permutations: Tensor,
    positions: Tensor | int | None,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_permutations(name, permutations)
    positions, offset = split_offset("permute", positions)
    op = _op("permute_fwd", backend)
    options = {"offset": offset} if offset else {}
    run = functools.partial(op, **options)
    return run_explained("permute", run, None, (q, k, permutations, positions, cu_seqlens))


def _check_permutations(name: str, permutations: Tensor) -> None:
    if not isinstance(permutations, Tensor):
        kind = type(permutations).__name__
        raise TypeError(f"{name}: permutations must be a Tensor, got {kind}")


def default_decay(k: Tensor) -> Tensor:
    """The authors' r_h = sigmoid(2 + 3 h / heads)."""
    heads = k.shape[-2]
    head = torch.arange(heads, dtype=torch.float32, device=k.device)
    return torch.sigmoid(2 + 3 * head / heads)


def _int32(cu_seqlens: Tensor | None) -> Tensor | None:
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        return cu_seqlens.to(torch.int32)
    return cu_seqlens


def _check_choices(name: str, q: Tensor, decay: Tensor | None, backend: str | None) -> None:
    if not torch.compiler.is_compiling():
        check_decay_values(name, decay)
    if backend is not None:
        _backends.require(name, backend, BACKENDS, q.device.type)
