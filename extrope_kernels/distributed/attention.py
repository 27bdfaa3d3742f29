"""Attention over a sequence that ranks share: the public function, which calls a strategy."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..methods import RopeFreqs
from ..ops import attention
from ..ops._math.positions import token_positions
from ..ops._tables.checks import REFUSALS, raise_as_value_error
from ..ops._torch.library import require
from ..scores import Score
from . import gather, ring, ulysses
from .blocks import Plan, runs
from .collectives import Group
from .layout import Balance, Mesh, check_balance, group_of

Strategy = Literal["gather", "ring", "ulysses"]
STRATEGIES = ("gather", "ring", "ulysses")


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    score: Score | None = None,
    *,
    mesh: Mesh,
    strategy: Strategy = "gather",
    balance: Balance = "zigzag",
    softmax_scale: float | None = None,
    log_n: float | None = None,
    query_scale: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
    return_lse: bool = False,
    rotated: attention.Rotated = None,
    backend: str | None = None,
) -> Tensor | Any:
    """Attend over a sequence whose tokens are spread over ranks, as `rope_attention` does.

    Every rank of the mesh makes the same call with its own tokens. out and gradients are those of
    one device, to rounding.

    q, k, v: (batch, seqlen / P, heads, head_dim), the tokens that `shard` gives this rank. With
        cu_seqlens all are (total / P, heads, head_dim).
    mesh: DeviceMesh of one dimension or ProcessGroup, the P ranks that share the sequence.
    strategy: "gather": every rank gathers all keys and values, an eighth of their heads at a time.
        "ring": they go round in P steps, 1/P of them at a time, and results are merged.
        "ulysses": ranks exchange tokens for heads; P divides q's heads, and is a multiple or a
        divisor of k's.
    balance: "zigzag" or None, as the tokens were cut, see `local_positions`.
    sinks: whole on every rank. Their gradient is that of this rank's rows (with "ulysses" of its
        heads): sum it over the ranks, as for any parameter.
    query_scale: of this rank's tokens.
    cu_seqlens: (sequences + 1,) int32 or int64, of the whole sequence; the host waits for its
        values. Not with "ring", nor with torch.compile.
    return_lse: return the log-sum-exp of this rank's queries too; differentiable.
    freqs, score, softmax_scale, log_n, softcap, sliding_window, interleaved, rotary_offset: as on
        one device.
    rotated, backend: as on one device. There are no q_start and k_start.

    Returns: out (batch, seqlen / P, heads_q, head_dim), and lse (batch, heads_q, seqlen / P).
        Differentiable once, in q, k, v and sinks.
    Raises: as on one device. A rank that raises alone leaves the others waiting until the group's
        timeout, or until torchrun ends them.
    """
    op = "rope_attention" if score is None else getattr(score, "name", "rope_attention")
    group = group_of(op, mesh)
    if strategy not in STRATEGIES:
        raise ValueError(f"{op}: strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
    check_balance(op, balance)
    attention.check_given(op, freqs, score, rotated, interleaved, return_lse)
    call = attention.make_call(
        freqs,
        score,
        rotated,
        interleaved=interleaved,
        cu_seqlens=cu_seqlens,
        sinks=sinks,
        query_scale=query_scale,
        softmax_scale=softmax_scale,
        rotary_offset=rotary_offset,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    attention.check_attention(op, q, k, v, call)  # numbers too
    if backend is not None:
        require(op, backend, attention.BACKENDS, q.device.type, attention.missing)
    _check(op, q, k, call, balance)
    boundaries = None
    if call.cu_seqlens is not None:
        boundaries = _boundaries(op, call.cu_seqlens, q.shape[0] * group.size, strategy)
    if log_n is not None:
        call = attention.scaled_by_log_n(op, log_n, _positions(q, call, group, balance), q, call)
    if freqs.log_decay is not None and not torch.compiler.is_compiling():
        of_all = [_shape_of_all(x, group.size) for x in (q, k)]
        attention.check_decay(op, freqs, of_all[0], of_all[1], call)
    plan = Plan(op, call, backend, group, balance, boundaries)
    if strategy == "ulysses":
        ulysses.check_heads(op, q.shape[-2], k.shape[-2], group)
    if torch.compiler.is_compiling():
        out, lse = _attend(plan, strategy, q, k, v, return_lse)
        return (out, lse) if return_lse else out
    try:
        out, lse = _attend(plan, strategy, q, k, v, return_lse)
    except REFUSALS as error:
        raise_as_value_error(error, "attention", op)  # a kernel's, in this function's name
        raise
    return (out, lse) if return_lse else out


def _attend(
    plan: Plan, strategy: Strategy, q: Tensor, k: Tensor, v: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend by a strategy, or on one rank by none."""
    if plan.group.size == 1:
        return attention.forward(q, k, v, plan.call, plan.backend)
    if strategy == "ulysses":
        return ulysses.attend(plan, q, k, v, return_lse)
    without = plan._replace(call=plan.call._replace(sinks=None))
    return _OfKeys.apply(without, strategy, q, k, v, plan.call.sinks)


def _check(op: str, q: Tensor, k: Tensor, call: attention.AttentionCall, balance: Balance) -> None:
    """Refuse arguments that only one device can take."""
    for name in ("inv_freq", "log_decay", "query_scale"):
        value = getattr(call, name)
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must not require grad over ranks, got one that does")
    if call.inv_freq.dim() == 3 and call.inv_freq.shape[-2] > 1:
        raise ValueError(
            f"{op}: inv_freq must be the same for all heads over ranks, "
            f"got shape {tuple(call.inv_freq.shape)}"
        )
    tokens = q.shape[-3]
    if k.shape[-3] != tokens:
        raise ValueError(f"{op}: k must have q's {tokens} tokens, got {k.shape[-3]}")
    if balance is not None and tokens % 2:
        raise ValueError(f"{op}: q must have an even number of tokens in zigzag, got {tokens}")


def _boundaries(op: str, cu_seqlens: Tensor, total: int, strategy: Strategy) -> list[int]:
    if strategy == "ring":
        raise NotImplementedError(
            f"{op}: strategy must be 'gather' or 'ulysses' with cu_seqlens, got 'ring'"
        )
    boundaries = cu_seqlens.tolist()
    if boundaries[0] != 0 or boundaries[-1] != total or boundaries != sorted(boundaries):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the {total} tokens of all ranks, "
            f"got {boundaries}"
        )
    return boundaries


def _positions(q: Tensor, call: attention.AttentionCall, group: Group, balance: Balance) -> Tensor:
    """Return the positions of this rank's tokens in their sequences: (seqlen / P,)."""
    tokens = q.shape[-3]
    own = [torch.arange(x.start, x.stop, device=q.device) for x in runs(tokens, group, balance)]
    i = torch.cat(own)
    if call.cu_seqlens is None:
        return i
    total = tokens * group.size
    return token_positions(None, False, call.cu_seqlens, total, q.device)[0, i]


def _shape_of_all(x: Tensor, ranks: int) -> Tensor:
    """Return a tensor without memory of its own, of the shape of all ranks' tokens."""
    return x.new_zeros(()).expand(*x.shape[:-3], x.shape[-3] * ranks, *x.shape[-2:])


class _OfKeys(torch.autograd.Function):
    """Attention by a strategy that sends keys: `gather` or `ring`."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        strategy: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.strategy = plan, strategy
        plan = plan._replace(call=plan.call._replace(sinks=sinks))
        out, lse = (ring if strategy == "ring" else gather).forward(plan, q, k, v)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint unpacks a tensor only once
        q, k, v, out, lse, sinks = saved
        plan = ctx.plan._replace(call=ctx.plan.call._replace(sinks=sinks))
        found: list[Tensor | None] = [None, None]
        with torch.no_grad():
            given = torch.zeros_like(out) if dout is None else dout.contiguous()
            of_strategy = (ring if ctx.strategy == "ring" else gather).backward
            found += of_strategy(plan, given, dlse, q, k, v, out, lse)
            asked = ctx.needs_input_grad[5]
            found.append(attention.grad_of_sinks(sinks, given, dlse, out, lse) if asked else None)
        if not torch.is_grad_enabled():
            return tuple(found)
        # PyTorch's `once_differentiable` would not see that gradients depend on saved tensors.
        sources = [x for x in (dout, dlse, *saved) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Refused.apply(plan.op, x, *sources) for x in found)


class _Refused(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.op}: derivatives over ranks must be first ones, got a second"
        )
