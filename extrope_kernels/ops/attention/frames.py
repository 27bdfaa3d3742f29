"""Rotate raw queries and keys into the frame of every region, and gradients back out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .regions import Layout, Region, Score, Turns


@dataclass(frozen=True)
class Call:
    """One attention call: its score method, its rotation, and how logits are scaled."""

    score: Score
    inv_freq: Tensor  # (rotary_dim / 2,), or one row a sequence
    cu_seqlens: Tensor | None = None
    log_decay: Tensor | None = None
    softmax_scale: float | None = None
    log_n: float | None = None
    attention_factor: float = 1.0
    interleaved: bool = False
    keys_stored: bool = False  # keys come rotated to score.stored_position, as a cache holds them


@dataclass(frozen=True)
class Frames:
    """q and k as every region sees them, or raw where layout.turns has tables, and the way back."""

    q: list[Tensor]
    k: list[Tensor]
    layout: Layout
    _call: Call
    _q_positions: list[Tensor]
    _k_positions: list[Tensor | None]

    def unrotate(self, dq: list[Tensor], dk: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The gradients of raw q and k, in their dtypes, from those of the frames."""
        if self.layout.turns is not None:  # the kernel has turned them back
            return dq[0], dk[0]
        sums = []
        for grads, positions, like, is_query in (
            (dq, self._q_positions, self.q[0], True),
            (dk, self._k_positions, self.k[0], False),
        ):
            total = _turn(grads[0], positions[0], self._call, is_query, adjoint=True)
            for grad, position in zip(grads[1:], positions[1:]):
                total = total + _turn(grad, position, self._call, is_query, adjoint=True)
            sums.append(total.to(like.dtype))
        return sums[0], sums[1]


def rotate(
    q: Tensor, k: Tensor, call: Call, q_as_read: bool = False, k_as_read: bool = False
) -> Frames:
    """Rotate q (..., seqlen_q, heads_q, head_dim) and k (..., seqlen_k, heads_k, head_dim).

    Differentiable, as the rotation is. Keys that a region wants as they are are not copied.

    q_as_read, k_as_read: leave the rotation to the kernel, which turns rows as it reads them. Saves
        the memory of the frames, and the time that an operating system takes to hand it out.
    """
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
    regions = call.score.regions(seqlen_k)
    i, j = _positions(seqlen_q, seqlen_k, call.cu_seqlens, q.device)
    q_positions = [region.q_positions(i) for region in regions]
    k_positions = [_key_turn(region, j, call) for region in regions]
    turns = None
    if q_as_read:
        turns = Turns(
            [_table(q, position, call, is_query=True) for position in q_positions],
            [_table(k, position if k_as_read else None, call, False) for position in k_positions],
            call.interleaved,
        )
    return Frames(
        q=[q if turns else _turn(q, position, call, is_query=True) for position in q_positions],
        k=[k] * len(regions) if k_as_read else _each_once(k, k_positions, regions, call),
        layout=Layout(
            starts=tuple(region.start for region in regions),
            granularity=call.score.granularity,
            softmax_scale=call.softmax_scale or q.shape[-1] ** -0.5,
            row_scale=None if call.log_n is None else log_n_scale(i, call.log_n),
            cu_seqlens=call.cu_seqlens,
            turns=turns,
        ),
        _call=call,
        _q_positions=q_positions,
        _k_positions=k_positions,
    )


def log_n_scale(positions: Tensor, log_n: float) -> Tensor:
    """max(1, ln(position + 1) / ln(log_n)) in float32: Su's scale of queries."""
    scale = torch.log(positions.clamp(min=0) + 1.0) / torch.log(torch.tensor(log_n).double())
    return scale.clamp(min=1.0).float()


def _positions(seqlen_q, seqlen_k, cu_seqlens, device) -> tuple[Tensor, Tensor]:
    """Float64 positions of queries and keys; queries are the last of the keys' positions."""
    j = torch.arange(seqlen_k, device=device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, j.to(cu_seqlens.dtype), right=True) - 1
        j = j - cu_seqlens[sequence.clamp(max=cu_seqlens.shape[0] - 2)]
        return j.double(), j.double()
    i = torch.arange(seqlen_q, device=device) + (seqlen_k - seqlen_q)
    return i.double(), j.double()


def _key_turn(region: Region, j: Tensor, call: Call) -> Tensor | None:
    """How far keys must turn from the frame they come in; None for not at all."""
    wanted = region.k_positions
    given = call.score.stored_position if call.keys_stored else None
    if wanted == given:
        return None
    turned = 0.0 if wanted is None else wanted(j)
    return turned if given is None else turned - given(j)


def _each_once(k, k_positions, regions, call) -> list[Tensor]:
    """Regions that rotate keys alike share one tensor."""
    frames = {}
    for region, position in zip(regions, k_positions):
        if region.k_positions not in frames:
            frames[region.k_positions] = _turn(k, position, call, is_query=False)
    return [frames[region.k_positions] for region in regions]


def _table(x: Tensor, position: Tensor | None, call: Call, is_query: bool) -> Tensor:
    """The cosines and sines by which x turns: what its rotation makes of the pair (1, 0)."""
    half = call.inv_freq.shape[-1]
    if position is None:
        return x.new_empty(0, dtype=torch.float32)
    rows = x.shape[0] if call.cu_seqlens is None and call.inv_freq.numel() > half else 1
    if call.inv_freq.numel() == half and position.numel() > 1 and position.stride(0) == 0:
        position = position[:1]
        call = dataclasses.replace(call, cu_seqlens=None)
    unit = x.new_tensor([1.0, 0.0], dtype=torch.float32).repeat_interleave(half)
    shape = position.shape if call.cu_seqlens is not None else (rows, *position.shape)
    unit = unit.expand(*shape, 1, 2 * half)
    split = dataclasses.replace(call, interleaved=False)
    return _turn(unit, position, split, is_query).view(rows, -1, 2 * half)


def _turn(x: Tensor, position: Tensor | None, call: Call, is_query: bool, adjoint=False) -> Tensor:
    """Rotate x; the attention factor of both sides goes onto q, so that raw keys can stay raw."""
    if position is None:
        return x
    log_decay = call.log_decay
    if log_decay is not None and not is_query:
        log_decay = -log_decay
    by = (call.inv_freq, position, call.cu_seqlens, log_decay)
    amplitude = call.attention_factor**2 if is_query else 1.0
    options = {"attention_factor": amplitude, "interleaved": call.interleaved}
    if adjoint:
        return torch.ops.extrope.rope_bwd(x, None, None, None, *by, **options)[0]
    return torch.ops.extrope.rope_fwd(x, None, *by, **options)[0]
