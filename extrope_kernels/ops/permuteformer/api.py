"""The public functions of PermuteFormer: permutations, attention, and attention step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .._math.dtypes import accumulator
from .._tables.checks import narrowed, refuse_flags, split_offset
from .._torch.autograd import in_func_transform, wants_grad
from .._torch.library import missing, ops, require
from . import reference
from .checks import MAX_DIM, check, check_powers, check_state, check_values
from .op import implementation
from .permutations import Powers
from .reference import next_state, seen
from .scans import Call, default_decay
from .scans import permute as permute_by_gather

BACKENDS = ("reference", "cpu", "fla")
Result = TypeVar("Result")


# -------------------------------------------------------------------------------------------------
# The permutation


def permute(
    x: Tensor,
    permutations: Tensor,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Permute the dims of every head p times at position p (PermuteFormer, arXiv 2109.02377).

    x'_p[c] = x_p[pi^p(c)] with pi the head's permutation: a gather by the p-th power, exact at any
    position an int64 holds. The inverse, and so the gradient, is the gather by the power -p.

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; float32,
        bfloat16, float16 or float64; any strides with a contiguous last dimension; head_dim up to
        1024.
    permutations: (heads or a divisor of it, head_dim) int64 on x's device, as from
        `head_permutations`; each serves that many consecutive heads. Every row must hold 0 to
        head_dim - 1 once. This is checked on the CPU only: on a GPU the check would wait for the
        device.
    positions: None for 0, 1, 2, ... within each sequence; an int or a (batch,) tensor is added to
        those; (seqlen,), (batch, seqlen) or (total,) gives every token's own. int32 or int64;
        negative positions are powers of the inverse. A 1-D tensor whose length fits both is read
        as (seqlen,): write offsets as (batch, 1) if they could be confused.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    inverse: undo the permutation: the power -p.
    backend: "cpu", "reference"; None for the best on x's device, on a GPU torch's gather. A named
        backend never falls back.

    Returns: the permuted x, with x's shape and dtype; differentiable to any order in x.
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    """
    return _permute(x, None, permutations, positions, cu_seqlens, inverse, backend)[0]


def permute_qk(
    q: Tensor,
    k: Tensor,
    permutations: Tensor,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Permute queries and keys; the q heads of a group share their k head's powers.

    q: (batch, seqlen, heads_q, head_dim), or (total, heads_q, head_dim) with cu_seqlens.
    k: as q, with heads_k heads; heads_q is a multiple of heads_k.
    permutations: (heads_k, head_dim) int64.
    positions, cu_seqlens, inverse, backend: as in `permute`.

    Returns: (q, k), permuted.
    Raises: as `permute`.
    """
    if not isinstance(k, Tensor):
        raise TypeError(f"permute: k must be a Tensor, got {type(k).__name__}")
    return _permute(q, k, permutations, positions, cu_seqlens, inverse, backend)


def _permute(
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | int | None,
    cu_seqlens: Tensor | None,
    inverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    refuse_flags("permute", inverse=inverse)
    powers = _powers("permute", q, k, permutations, positions, cu_seqlens)
    if backend is not None:
        require("permute", backend, BACKENDS[:2], q.device.type)
    if backend == "reference":
        check_values("permute", q.shape[0], powers)
        return permute_by_gather(q, k, powers, inverse)
    options = {"offset": powers.offset, "inverse": inverse}
    run = functools.partial(ops.permute_fwd, q, k, *powers[:3], **options)
    out_q, out_k = _named("permute", q, powers, run)
    return out_q, out_k if k is not None else None


def _powers(
    name: str,
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | int | None,
    cu_seqlens: Tensor | None = None,
) -> Powers:
    """Check a call's powers, except for values, which kernels check; return them."""
    positions, offset = split_offset(name, positions)
    cu_seqlens = narrowed(cu_seqlens)
    powers = Powers(permutations, positions, cu_seqlens, offset)
    check_powers(name, q, k, *powers[:3])
    return powers


def _named(name: str, q: Tensor, powers: Powers, run: Callable[[], Result]) -> Result:
    """Call an op; a refusal by its kernel is raised in this function's name."""
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (RuntimeError, ValueError):
        check_values(name, q.shape[0], powers)
        raise


# -------------------------------------------------------------------------------------------------
# Attention


class PermuteFormerState(NamedTuple):
    """State left by earlier tokens; float32 (float64 for float64 inputs), contiguous.

    kv: (batch, heads, head_dim, head_dim_v): sum of decay**age phi(k) v^T; heads are those of
        decay, or of k.
    k: (batch, heads, head_dim): sum of decay**age phi(k).
    """

    kv: Tensor
    k: Tensor


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
    phi(k_j)[pi^j]> and phi(x) = relu(x) + 1e-3. Only powers of r within a chunk of tokens are
    formed, so no length overflows. Sums over chunks are float32, in order: the rounding of a row
    that sees n tokens grows with n over the length of a chunk (48 on a CPU), not with n.

    On a GPU flash-linear-attention runs (pip install flash-linear-attention). Its products of
    float32 are TF32's, and it waits for the device to read cu_seqlens. Without it, and in float64,
    the PyTorch reference runs; its time and memory grow with the square of seqlen. With
    causal=False a GPU takes two products of PyTorch. This path is tested only on a CPU.

    A NaN or an infinity spoils the rows that see it; one in v only its own dim. On a GPU it may
    spoil other rows of its chunk; in float64 and with backend="reference" any row.

    q: (batch, seqlen, heads_q, head_dim), not permuted; float32, bfloat16, float16 or float64; any
        strides with a contiguous last dimension. With cu_seqlens (total, heads, head_dim).
    k: (batch, seqlen, heads_k, head_dim), heads_k a divisor of heads_q.
    v: (batch, seqlen, heads_k, head_dim_v). Dimensions of heads up to 256.
    permutations: (heads_k, head_dim) int64, as from `head_permutations`.
    decay: r, (heads_k,) or (heads_q,) in (0, 1], float32 or float64; no gradient. None for the
        authors' sigmoid(2 + 3 h / heads_k); ones for no decay. It counts tokens, not positions.
        Not with causal=False, where nothing decays.
    causal: False lets every row see its whole sequence, as the authors' LRA code does.
    normalize: False leaves the denominator out, as the authors' language model does.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    positions: as in `permute`: None for 0, 1, 2, ..., an int or (batch,) to add to those, or each
        token's own.
    backend: "cpu", "fla", "reference"; None for the best on q's device. A named backend never
        falls back.

    Returns: (batch, seqlen, heads_q, head_dim_v) in q's dtype, or (total, ...). Differentiable in
        q, k and v; to any order with backend="reference".
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    Paper: https://arxiv.org/abs/2109.02377
    """
    name = "permuteformer_attention"
    refuse_flags(name, causal=causal, normalize=normalize)
    cu_seqlens = narrowed(cu_seqlens)
    check(name, q, k, v, decay, cu_seqlens, causal)
    powers = _powers(name, q, k, permutations, positions, cu_seqlens)
    _check_choices(name, q, decay, backend)
    if causal and decay is None:
        decay = default_decay(k)
    if backend == "reference":
        heads = k.shape[-2] if decay is None else decay.shape[0]
        call = Call(heads, decay, powers.cu_seqlens, causal, normalize)
        check_values(name, q.shape[0], powers)
        return reference.forward(q, k, v, powers, call).out.to(q.dtype)
    at = permutations, powers.positions, decay, powers.cu_seqlens
    options = {"offset": powers.offset, "causal": causal, "normalize": normalize}
    run = functools.partial(ops.permuteformer_fwd, q, k, v, *at, **options)
    return _named(name, q, powers, run)[0].to(q.dtype)


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
    """Continue a state by seqlen tokens: a prompt without one, then a token or more at a time.

    The results are the same, up to rounding, wherever a sequence is cut. The state replaces a
    key/value cache and does not grow; a given state is not changed.

    q, k, v, permutations, decay, normalize, backend: as in `permuteformer_attention`, not packed.
    state: None at the start, then what the last call returned.
    positions: of the first token, an int or (batch,) tensor, or (seqlen,) or (batch, seqlen) for
        each; 0 without a state, required with one. If batch and seqlen are equal, write (batch, 1)
        for those of the first tokens.

    Returns: (batch, seqlen, heads_q, head_dim_v) in q's dtype, and the state after the last token.
        Differentiable in q, k, v and the state, to first order, with v of less than 256
        dimensions; to any order with backend="reference".
    Raises: as `permuteformer_attention`.
    """
    name = "permuteformer_step"
    refuse_flags(name, normalize=normalize)
    check(name, q, k, v, decay, None)
    powers = _powers(name, q, k, permutations, positions)
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
        state = PermuteFormerState(*state)  # a plain tuple is as good
    kv, key_sum = (None, None) if state is None else state
    if backend == "reference":
        check_values(name, q.shape[0], powers)
        call = Call(decay.shape[0], decay, None, True, normalize, kv, key_sum, keep_state=True)
        _, _, kv, key_sum = found = reference.forward(q, k, v, powers, call)
        return found.out.to(q.dtype), PermuteFormerState(kv, key_sum)
    given = [x for x in (q, k, v, kv, key_sum) if x is not None]
    # Under torch.vmap a tensor of torch.func.grad does not say that it requires gradients.
    transformed = not torch.compiler.is_compiling() and in_func_transform()
    if torch.is_grad_enabled() and (transformed or any(x.requires_grad for x in given)):
        recorded = functools.partial(_recorded_step, q, k, v, state, powers, decay, normalize)
        return _named(name, q, powers, recorded)
    at = permutations, powers.positions, kv, key_sum, decay
    options = {"offset": powers.offset, "normalize": normalize}
    step = functools.partial(ops.permuteformer_step, q, k, v, *at, **options)
    out, kv, key_sum = _named(name, q, powers, step)
    return out, PermuteFormerState(kv, key_sum)


def _recorded_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: PermuteFormerState | None,
    powers: Powers,
    decay: Tensor,
    normalize: bool,
) -> tuple[Tensor, PermuteFormerState]:
    """Make a step's states by PyTorch's operations, which have gradients; the kernels have none."""
    if v.shape[-1] >= MAX_DIM and implementation(q, v) is not reference:
        raise ValueError(
            f"permuteformer_step: v's head_dim must be less than {MAX_DIM} for gradients "
            f"(backend='reference' takes any), got {v.shape[-1]}"
        )
    at, offset = powers[:2], powers.offset
    wide = accumulator(q.dtype)
    rows, keys, values = (x.to(wide) for x in (q, k, v))
    values = functional.pad(values, (0, 1), value=1.0)  # its sums are those of the keys
    out, _ = ops.permuteformer_fwd(rows, keys, values, *at, decay, offset=offset, normalize=False)
    rows, keys = ops.permute_fwd(rows, keys, *at, offset=offset)
    first = None
    if state is not None:
        first = torch.cat([state.kv, state.k.unsqueeze(-1)], -1)
        out = out + seen(rows, first, decay)
    after = next_state(first, keys, values, decay)
    out, total = out[..., :-1], out[..., -1:]
    out = (out / total if normalize else out).to(q.dtype)
    return out, PermuteFormerState(after[..., :-1].contiguous(), after[..., -1].contiguous())


def backends() -> dict[str, str]:
    """Return "available" for each backend, or why it is not."""
    return {name: missing(name) or "available" for name in BACKENDS}


def _check_choices(name: str, q: Tensor, decay: Tensor | None, backend: str | None) -> None:
    check_values(name, q.shape[0], decay=decay)
    if backend != "reference" and wants_grad((decay,)):
        raise ValueError(f"{name}: decay must not require grad, got one that does")
    if backend is not None:
        require(name, backend, BACKENDS, q.device.type)
    if backend == "fla" and q.dtype == torch.float64:
        raise ValueError(f"{name}: q must be at most float32 for backend='fla', got {q.dtype}")
