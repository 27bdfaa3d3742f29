"""The op `rope_cos_sin_triton`: one launch, planned once for each layout of its arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.launch import Plan, chip_of, layouts_of, planned, strides_of
from ..cos_sin import check
from .kernel import Tile, rotate_head
from .launch import operand_of
from .ops import like
from .programs import alignment_of, programs_of


@triton.jit(
    do_not_specialize=("cos_batch", "cos_seq", "sin_batch", "sin_seq", "tokens", "seqlen"),
)
def cos_sin_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    of_q,
    of_k,
    cos_batch,
    cos_seq,
    sin_batch,
    sin_seq,
    direction,
    tokens,
    seqlen,
    TILE: tl.constexpr,
):
    """Axis 0: tiles of tokens, counted through batch and seqlen; axis 1: shares of the heads."""
    TOKENS: tl.constexpr = TILE.tokens
    PAIRS: tl.constexpr = TILE.pairs
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    first = tl.program_id(0).to(tokens.dtype) * TOKENS
    valid = tl.arange(0, TOKENS) < tokens - first
    token = first + tl.arange(0, TOKENS)
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    at_cos = cos + (batch * cos_batch + seq * cos_seq)[:, None] + pair[None, :]
    at_sin = sin + (batch * sin_batch + seq * sin_seq)[:, None] + pair[None, :]
    c = tl.load(at_cos, mask=mask, other=0.0).to(WIDE)
    s = tl.load(at_sin, mask=mask, other=0.0).to(WIDE) * direction
    nothing = tl.zeros((TOKENS, PAIRS), WIDE)
    share = tl.cdiv(of_q.heads, tl.num_programs(1))
    start = tl.program_id(1) * share
    for head in range(start, tl.minimum(start + share, of_q.heads)):
        rotate_head(q, q_out, None, of_q, head, batch, seq, valid, c, s, nothing, TILE)
    if TILE.two_operands:
        share = tl.cdiv(of_k.heads, tl.num_programs(1))
        start = tl.program_id(1) * share
        for head in range(start, tl.minimum(start + share, of_k.heads)):
            rotate_head(k, k_out, None, of_k, head, batch, seq, valid, c, s, nothing, TILE)


def rope_cos_sin(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **options: bool
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.rope_cos_sin`."""
    out_q, out_k = like(q, q), like(k, q)
    key = (chip_of(q), layouts_of(q, k, cos, sin), tuple(options.items()))
    launch = planned(_plan, key, (q, k), (out_q, out_k), cos, sin, options)
    if launch is not None:
        launch(q, k, out_q, out_k if k is not None else None, cos, sin)
    return out_q, out_k


def _plan(
    given: tuple[Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    options: dict[str, Any],
) -> Plan | None:
    check(*given, cos, sin)
    inputs = [x for x in given if x is not None]
    batch, seqlen, _, head_dim = inputs[0].shape
    heads = max(x.shape[2] for x in inputs)
    if batch * seqlen * heads == 0:
        return None
    half = cos.shape[2]
    pairs = triton.next_power_of_2(half)
    programs = programs_of(inputs[0], pairs, heads)
    tail = head_dim - 2 * half
    tile = Tile(
        two_operands=len(inputs) == 2,
        tokens=programs.tokens,
        half=half,
        pairs=pairs,
        tail=tail,
        padded_tail=triton.next_power_of_2(max(tail, 1)),
        align=alignment_of((*inputs, *outputs[: len(inputs)])),
        interleaved=options.get("interleaved", False),
        wide=inputs[0].dtype == torch.float64,
        per_head=False,
        positions_are_offsets=False,
    )
    operands = [operand_of(x, out, x, 1.0, tile.align) for x, out in zip(inputs, outputs)]
    (cos_batch, cos_seq), (sin_batch, sin_seq) = strides_of(cos)[:2], strides_of(sin)[:2]
    return Plan(
        cos_sin_kernel,
        (programs.tiles, programs.shares),
        inputs[0],
        of_q=operands[0],
        of_k=operands[1] if len(operands) == 2 else None,
        cos_batch=cos_batch,
        cos_seq=cos_seq,
        sin_batch=sin_batch,
        sin_seq=sin_seq,
        direction=-1.0 if options.get("conjugate", False) else 1.0,
        tokens=batch * seqlen,
        seqlen=seqlen,
        TILE=tile,
        num_warps=programs.warps,
    )
