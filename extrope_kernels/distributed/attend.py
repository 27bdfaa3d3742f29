"""From the arguments of a function over a shared sequence to a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..methods import RopeFreqs
from ..ops._shared.checks import refuse_flags
from ..ops._shared.options import SoftmaxOptions, tensor_or_pair
from ..ops.attention import BlockCall, block_call, block_forward, check_block
from ..scores import Score
from . import gather, ring
from .agreement import Settings, agreed, contents
from .collectives import Group
from .layout import ALONE, Balance, Devices, Mesh, check_balance, devices_of
from .rows import RopeTensors, blocks_of
from .ulysses import check_heads, lse_to_tokens, numbers_of_all, to_heads, to_tokens

if TYPE_CHECKING:
    from typing_extensions import Required

Strategy = Literal["gather", "ring", "ulysses"]
_STRATEGIES = ("gather", "ring", "ulysses")


class ShardedOptions(SoftmaxOptions, total=False):
    """What every function here takes beside the parameters of its score method."""

    mesh: Required[Mesh]
    strategy: Strategy
    balance: Balance
    cu_seqlens: Tensor | None


class Prepared(NamedTuple):
    """A call whose arguments are right."""

    call: BlockCall
    rope: RopeTensors
    cu_seqlens: Tensor | None
    boundaries: list[int] | None
    devices: Devices
    strategy: Strategy
    balance: Balance


@tensor_or_pair
def attend(
    score: Score | Callable[[], Score],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
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
    return_lse: bool = False,
    backend: str | None = None,
    keys_stored: bool = False,
    op: str = "attend",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run any score method over a sequence that ranks share; the rest as for `rerope_attention`.

    op: the name that errors begin with.
    keys_stored: keys come as a cache keeps them, rotated to `score.stored`, not raw.
    """
    grid = devices_of(op, mesh)

    def prepare() -> Prepared:
        devices = _by_strategy(op, grid, strategy)
        refuse_flags(op, return_lse=return_lse)
        method = score if isinstance(score, Score) else score()
        call = block_call(
            op,
            method,
            freqs,
            softmax_scale=softmax_scale,
            log_n=log_n,
            softcap=softcap,
            sliding_window=sliding_window,
            interleaved=interleaved,
            backend=backend,
            keys_stored=keys_stored,
            **unknown,
        )
        rope = RopeTensors(freqs.inv_freq, freqs.log_decay, sinks, query_scale)
        return _prepared(call, q, k, v, rope, cu_seqlens, devices, strategy, balance)

    def describe(prepared: Prepared) -> Settings:
        return _settings(prepared, q, k, v, return_lse)

    prepared = agreed(op, mesh, prepare, describe)
    devices = prepared.devices
    if devices.inner.size == 1:
        out, lse = _attend(prepared, q, k, v)
        return (out, lse) if return_lse else out
    swap = (devices.inner, balance)
    prepared = prepared._replace(rope=_of_heads(prepared.rope, *swap))
    q, k, v = (to_heads(x, *swap) for x in (q, k, v))
    out, lse = _attend(prepared, q, k, v)
    out = to_tokens(out, *swap)
    return (out, lse_to_tokens(lse, *swap)) if return_lse else out


def _attend(prepared: Prepared, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The heads of this rank, over the outer ranks."""
    call, rope, cu_seqlens, boundaries, devices, strategy, balance = prepared
    if devices.outer.size == 1:
        rope_args = (rope.inv_freq, cu_seqlens, rope.log_decay, rope.sinks, rope.query_scale)
        return block_forward(call, q, k, v, *rope_args)
    if strategy == "ring":
        return ring.attend(ring.Plan(call, devices.outer, balance), q, k, v, rope)
    blocks = blocks_of(q.shape[-3], devices.outer, balance, boundaries, q.device)
    return gather.attend(gather.Plan(call, devices.outer, balance, blocks), q, k, v, rope)


def _by_strategy(op: str, devices: Devices, strategy: Strategy) -> Devices:
    """Who gathers or stands in a ring, and who exchanges heads."""
    if strategy not in _STRATEGIES:
        raise ValueError(f"{op}: strategy must be one of {list(_STRATEGIES)}, got {strategy!r}")
    if strategy != "ulysses":
        return devices
    if devices.inner.size > 1:
        raise ValueError(
            f"{op}: strategy must be 'gather' or 'ring' over a mesh of two dimensions, in whose "
            "second heads are exchanged, got 'ulysses'"
        )
    return Devices(ALONE, devices.outer)


def _prepared(
    call: BlockCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: RopeTensors,
    cu_seqlens: Tensor | None,
    devices: Devices,
    strategy: Strategy,
    balance: Balance,
) -> Prepared:
    """Everything that is refused is refused here."""
    op = call.op
    check_balance(op, balance)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    check_block(call, q, k, v, rope.inv_freq, cu_seqlens, *rope[1:])
    tokens = q.shape[-3]
    if k.shape[-3] != tokens:
        raise ValueError(f"{op}: k must have q's {tokens} tokens, got {k.shape[-3]}")
    if balance is not None and tokens % 2:
        raise ValueError(f"{op}: q must have an even number of tokens in zigzag, got {tokens}")
    if devices.inner.size > 1:
        check_heads(op, q.shape[-2], k.shape[-2], devices.inner)
    boundaries = None
    if cu_seqlens is not None:
        if strategy == "ring":
            raise NotImplementedError(
                f"{op}: a ring does not take cu_seqlens yet; strategy 'gather' and 'ulysses' do"
            )
        boundaries = cu_seqlens.tolist()
        total = tokens * devices.size
        if boundaries[0] != 0 or boundaries[-1] != total or boundaries != sorted(boundaries):
            raise ValueError(
                f"{op}: cu_seqlens must rise from 0 to the {total} tokens of all ranks, "
                f"got {boundaries}"
            )
    return Prepared(call, rope, cu_seqlens, boundaries, devices, strategy, balance)


def _settings(
    prepared: Prepared,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    return_lse: bool,
) -> Settings:
    """What has to be the same on all ranks, so that they send one another what they expect."""
    rope = prepared.rope
    tensors = {"q": q, "k": k, "v": v, "sinks": rope.sinks, "query_scale": rope.query_scale}
    shapes = {name: None if x is None else (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    differentiable = [
        name for name, x in tensors.items() if x is not None and x.requires_grad
    ] * torch.is_grad_enabled()
    return {
        **{f"the shape and dtype of {name}": shape for name, shape in shapes.items()},
        "what requires grad": differentiable,
        "the contents of inv_freq and log_decay": contents(rope.inv_freq, rope.log_decay),
        "strategy": prepared.strategy,
        "balance": prepared.balance,
        "return_lse": return_lse,
        "cu_seqlens": prepared.boundaries,
        "the score method and its options": prepared.call.options,
        "backend": prepared.call.backend,
    }


def _of_heads(rope: RopeTensors, group: Group, balance: Balance) -> RopeTensors:
    """For all tokens of the group and this rank's heads."""
    sinks, scale = rope.sinks, rope.query_scale
    if sinks is not None:
        sinks = sinks.chunk(group.size)[group.rank]
    if scale is not None:
        scale = numbers_of_all(scale, group, balance)
    return rope._replace(sinks=sinks, query_scale=scale)
