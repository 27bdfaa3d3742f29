"""Attention between blocks of longer sequences, forward and backward each by itself.

What spreads a sequence over devices calls these: it knows the log-sum-exp of all blocks, with which
the backward of each is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import Score
from .._shared import backends as _backends
from .._shared.attention_call import AttentionCall, check_freqs, rope_options, score_options
from .._shared.checks import refuse_flags
from .._shared.library import ops
from .._shared.options import refuse_unknown
from .._shared.softmax import grad_of_sinks as grad_of_sinks
from . import reference
from .api import BACKENDS, missing, run
from .checks import check


@dataclass(frozen=True)
class BlockCall:
    """What all blocks of an attention call have in common, but for tensors."""

    op: str  # the name that errors begin with
    options: dict[str, Any]  # of the op
    backend: str | None

    def first_key(self, query: int) -> int:
        """The position of the first key that a query at this position can see; may be negative."""
        granularity, window = self.options["granularity"], self.options.get("sliding_window")
        first = query // granularity * granularity + self.options["starts"][0]
        return first if window is None else max(first, query + 1 - window)

    def queries_end(self, end: int) -> int:
        """The position behind the last query that can see a key before position `end`."""
        granularity, window = self.options["granularity"], self.options.get("sliding_window")
        last = -((self.options["starts"][0] - end) // granularity) * granularity
        return last if window is None else min(last, end + window - 1)


def block_call(
    op: str,
    score: Score,
    freqs: RopeFreqs,
    *,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    interleaved: bool = False,
    backend: str | None = None,
    keys_stored: bool = False,
    **unknown: Any,
) -> BlockCall:
    """Check a call's options; their meanings and errors are those of `attend`."""
    refuse_unknown(op, unknown)
    refuse_flags(op, interleaved=interleaved)
    check_freqs(op, freqs)
    options = score_options(score, stored=keys_stored)
    options |= rope_options(op, freqs, softmax_scale, log_n, interleaved, softcap, sliding_window)
    return BlockCall(op, options, backend)


def check_block(call: BlockCall, q: Tensor, k: Tensor, v: Tensor, *rope_args: Tensor | None):
    """Raise what `attend` would raise for these tensors; nothing runs."""
    described = AttentionCall(*rope_args, **call.options)  # type: ignore[arg-type]
    check(call.op, q, k, v, described)
    if call.backend is not None:
        _backends.require(call.op, call.backend, BACKENDS, q.device.type, missing)
    for name in ("inv_freq", "log_decay", "query_scale"):
        value = getattr(described, name)
        if value is not None and value.requires_grad:
            raise ValueError(f"{call.op}: {name} has no gradient here, got one that requires grad")


def block_forward(
    call: BlockCall, q: Tensor, k: Tensor, v: Tensor, *rope_args: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and lse of the queries over these keys.

    rope_args: inv_freq, cu_seqlens, log_decay, sinks, query_scale, q_start and k_start as
        `torch.ops.extrope.attention_fwd` takes them.
    """
    return run(call.op, (q, k, v, *rope_args), call.options, call.backend)


def block_backward(
    call: BlockCall,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rope_args: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to dq, and all that these queries contribute to dk and dv.

    out, lse, dout, dlse: of the queries over all of their keys, in this block and in others.
    """
    given = (dout, dlse, q, k, v, out, lse)
    if call.backend == "reference" or (call.backend in (None, "cpu") and q.dtype == torch.float64):
        return reference.backward(*given, AttentionCall(*rope_args, **call.options))  # type: ignore[arg-type]
    suffix = f"_{call.backend}" if call.backend in ("triton", "flash_attn") else ""
    backward = getattr(ops, f"attention_bwd{suffix}")
    return backward(*given, *rope_args, **call.options)
