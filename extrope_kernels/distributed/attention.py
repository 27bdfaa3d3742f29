"""The attention functions over a sequence that ranks share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from .. import scores
from ..methods import RopeFreqs
from ..ops._shared.attention_call import rerope_score, score_of
from ..ops._shared.options import takes_options_of
from .attend import ShardedOptions, attend

if TYPE_CHECKING:
    from typing_extensions import Unpack

_public = takes_options_of(attend, internal=("keys_stored", "op"))


@_public
def rerope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    window: int,
    factor: float = math.inf,
    grouped: bool = False,
    **options: Unpack[ShardedOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`extrope_kernels.rerope_attention` of a sequence whose tokens are spread over ranks.

    Every rank of the mesh calls it alike, with its own tokens; out and gradients are those of one
    device, to rounding. With a window of the sequence's length or more it is plain attention.

    q, k, v: (batch, seqlen / P, heads, head_dim), the tokens that `shard` gives this rank. With
        cu_seqlens all are (total / P, heads, head_dim).
    mesh: DeviceMesh or ProcessGroup, the P ranks that share the sequence. With two dimensions ranks
        exchange heads in the second (as "ulysses"), and do as `strategy` says in the first.
    strategy: "gather": every rank gathers all keys and values, an eighth of their heads at a time.
        "ring": they go round in P steps, 1/P of them at a time, and results are merged.
        "ulysses": ranks exchange tokens for heads; P divides q's heads, and is a multiple or a
        divisor of k's.
    balance: "zigzag" or None, as the tokens were cut, see `local_positions`.
    sinks: whole on every rank. Their gradient is that of this rank's rows (of its heads, where
        they are exchanged): the ranks' sum is the gradient, as for any parameter.
    query_scale: of this rank's tokens.
    cu_seqlens: (sequences + 1,) int32 or int64, of the whole: its values are waited for. Not with
        "ring", nor with torch.compile.
    return_lse: the log-sum-exp too, of this rank's queries; differentiable.
    Everything else as on one device; there are no q_start and k_start.

    Returns: out (batch, seqlen / P, heads_q, head_dim), and lse (batch, heads_q, seqlen / P).
        Differentiable once, in q, k, v and sinks.
    Raises: as on one device. What is wrong on one rank alone, or differs between ranks, leaves the
        others waiting: with EXTROPE_CHECK=1 in the environment all of them raise instead.
    """
    op = "rerope_attention"
    return attend(
        lambda: rerope_score(op, window, factor, grouped), q, k, v, freqs, op=op, **options
    )


@_public
def dual_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    chunk_size: int,
    local_window: int,
    **options: Unpack[ShardedOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`extrope_kernels.dual_chunk_attention` of a sequence whose tokens are spread over ranks.

    chunk_size, local_window: as on one device; a chunk need not end where a rank's tokens do.
    Everything else as in `rerope_attention` here.
    """
    op = "dual_chunk_attention"
    return attend(
        lambda: score_of(op, scores.dual_chunk, chunk_size, local_window),
        q,
        k,
        v,
        freqs,
        op=op,
        **options,
    )


@_public
def blockwise_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    block_size: int,
    **options: Unpack[ShardedOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`extrope_kernels.blockwise_causal_attention` of a sequence spread over ranks.

    block_size: as on one device; a block need not end where a rank's tokens do.
    Everything else as in `rerope_attention` here.
    """
    op = "blockwise_causal_attention"
    return attend(
        lambda: score_of(op, scores.blockwise_causal, block_size),
        q,
        k,
        v,
        freqs,
        op=op,
        **options,
    )


@_public
def string_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    shift: int,
    window: int,
    **options: Unpack[ShardedOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`extrope_kernels.string_attention` of a sequence whose tokens are spread over ranks.

    shift, window: as on one device.
    Everything else as in `rerope_attention` here.
    """
    op = "string_attention"
    return attend(
        lambda: score_of(op, scores.string, shift, window), q, k, v, freqs, op=op, **options
    )
