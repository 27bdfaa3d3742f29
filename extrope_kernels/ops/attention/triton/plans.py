"""Plans of one attention call: its launches, settled for the layout of the tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._shared.triton.launch import INTERPRETED, Plan, chip_of
from ..._shared.triton.position_maps import kind_of, side_arguments
from ..call import AttentionCall, lse_shape
from .backward_keys import dkv_kernel
from .backward_queries import dq_kernel
from .configs import MOST_ROWS, Config, config
from .forward import forward_kernel
from .frames import (
    FARTHEST,
    alignment_of,
    frame_strides,
    frequency_stride,
    key_maps,
    per_log_n,
    placed,
    query_scale_stride,
    regions_of,
    rotation,
    row_strides,
    start_strides,
    unseen_keys,
)
from .rows import Tile

LEAST_DIMS = 16  # of a product
MOST_REGIONS = 3
Shape = tuple[int, ...]


class ForwardPlans(NamedTuple):
    """Launches, and shapes of what they write beside out. None: there is nothing to launch."""

    rotate: Plan | None
    attend: Plan | None
    k_frames: Shape
    q_frame: Shape | None  # where rows of out have no room for those of q
    out: Shape
    lse: Shape


class BackwardPlans(NamedTuple):
    rotate: Plan | None
    dq: Plan | None
    dkv: Plan | None
    unrotate: Plan | None
    q_frames: Shape
    k_frames: Shape
    dk_frames: Shape


def forward_plans(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> ForwardPlans:
    """Of a call that has been checked."""
    layout = _Layout(q, k, v, call)
    align, k_maps = layout.align, key_maps(k, call)
    attend = layout.plan(
        forward_kernel,
        "forward",
        q_strides=row_strides(q, align),
        k_strides=row_strides(k, align),
        k_frame_strides=frame_strides(k, align)[:2],
        v_strides=row_strides(v, align),
        out_strides=layout.out_strides(),
        q_frame_strides=frame_strides(q, align)[:2],
        freq_stride=frequency_stride(call),
        query_scale_stride=query_scale_stride(call),
        amplitude=call.attention_factor**2,
        per_log_n=per_log_n(call),
        **side_arguments("q", [region.q_map for region in layout.regions]),
    )
    lse = lse_shape(q)
    rotate = rotation(q, k, (), k_maps, call, unseen=unseen_keys(q, k, call))
    like_q = v.shape[-1] == q.shape[-1] and call.results_dtype(q.dtype) == q.dtype
    q_frame = None if like_q else (*q.shape,)
    out = (*q.shape[:-1], v.shape[-1])
    return ForwardPlans(rotate, attend, (len(k_maps), *k.shape), q_frame, out, lse)


def backward_plans(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> BackwardPlans:
    """Of a call that has been checked."""
    layout = _Layout(q, k, v, call, dout, out)
    regions, k_maps, align = layout.regions, key_maps(k, call), layout.align
    q_maps = [region.q_map for region in regions]
    strides = {
        "q_frame_strides": frame_strides(q, align)[:2],
        "k_strides": row_strides(k, align),
        "k_frame_strides": frame_strides(k, align)[:2],
        "v_strides": row_strides(v, align),
        "dout_strides": row_strides(dout, align),
    }
    of_dv = None if v.shape == k.shape else frame_strides(v, align)[:2]
    return BackwardPlans(
        rotation(q, k, q_maps, k_maps, call),
        layout.plan(dq_kernel, "dq", out_strides=row_strides(out, align), **strides),
        layout.plan(dkv_kernel, "dkv", dv_strides=of_dv, **strides),
        rotation(q, k, q_maps, [region.k_map for region in regions], call, inverse=True),
        (len(regions), *q.shape),
        (len(k_maps), *k.shape),
        (len(regions), *k.shape),
    )


class _Layout:
    """What all kernels on the blocks of one call are told."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *others: Tensor
    ) -> None:
        self.call, self.q, self.chip = call, q, chip_of(q)
        self.batch = 1 if call.cu_seqlens is not None else v.shape[0]
        self.seqlen_q, self.heads_q, self.head_dim = q.shape[-3:]
        self.seqlen_k, self.heads_k, self.head_dim_v = v.shape[-3:]
        self.regions, self.placed = regions_of(k, call), placed(call)
        self.k_maps = key_maps(k, call)
        self.align = alignment_of(q, k, v, *others)
        given = (q, k, v, *others)
        self.contiguous = all(x.stride()[-3:] == _contiguous(x) for x in given)
        for x in given:
            _check_offsets(x)

    def plan(self, kernel: Any, name: str, **of_kernel: Any) -> Plan | None:
        """Of "forward" or "dq", a program for each block of queries, or of "dkv", of keys.

        of_kernel: what is settled of this kernel alone, by its parameters.
        """
        widest = max(self.head_dim, self.head_dim_v)
        setting = config(name, widest, self.q.itemsize, self.chip)
        size, seqlen, heads = setting.block_m, self.seqlen_q, self.heads_q
        if name == "dkv":
            size, seqlen, heads = setting.block_n, self.seqlen_k, self.heads_k
        blocks, sequences = triton.cdiv(seqlen, size), 0
        if self.call.cu_seqlens is not None:
            sequences = self.call.cu_seqlens.shape[0] - 1
            blocks = seqlen // size + sequences
        programs = blocks * heads * self.batch
        if programs == 0 or seqlen == 0:
            return None
        return Plan(
            kernel,
            (programs,),
            self.q,
            **of_kernel,
            start_strides=start_strides(self.call),
            num_sequences=sequences,
            search_steps=sequences.bit_length(),
            blocks=blocks,
            rows=self.seqlen_q,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            **self._bounds(),
            softmax_scale=self.call.scale(self.head_dim),
            softcap=self.call.softcap or None,
            TILE=self._tile(setting, self.head_dim),
            VALUES=self._tile(setting, self.head_dim_v),
            num_warps=setting.warps,
            num_stages=setting.stages,
            maxnreg=setting.maxnreg,
        )

    def out_strides(self) -> Shape:
        """Of contiguous out, as frame_strides."""
        seqlen, heads, dim = self.seqlen_q, self.heads_q, self.head_dim_v
        size = seqlen * heads * dim // self.align
        return self.batch * size, size

    def _tile(self, setting: Config, head_dim: int) -> Tile:
        dims, more_dims = _parts(head_dim, setting.halves)
        half = self.call.inv_freq.shape[-1]
        return Tile(
            block_m=setting.block_m,
            block_n=setting.block_n,
            heads_q=self.heads_q,
            heads_k=self.heads_k,
            head_dim=head_dim,
            dims=dims,
            more_dims=more_dims,
            rotated=min(setting.rotated, setting.block_m),
            half=half,
            interleaved=self.call.interleaved,
            paired=not self.call.interleaved and dims == more_dims == half,
            q_maps=tuple(kind_of(region.q_map) for region in self.regions),
            k_frame=tuple(
                self.k_maps.index(r.k_map) if r.k_map in self.k_maps else -1 for r in self.regions
            ),
            from_first_key=not self._windowed() and self.regions[0].start <= -self._farthest(),
            windowed=self._windowed(),
            capped=self.call.softcap > 0,
            align=self.align,
            contiguous=self.contiguous,
            widen=INTERPRETED and self.q.dtype == torch.bfloat16,
        )

    def _farthest(self) -> int:
        """No query sees farther."""
        return FARTHEST if self.placed else max(self.seqlen_k, 1)

    def _windowed(self) -> bool:
        window = self.call.sliding_window
        return window is not None and window < self._farthest()

    def _bounds(self) -> dict[str, int | None]:
        """No larger than the sequence: int32 then never overflows."""
        most, window = self._farthest(), self.call.sliding_window
        starts = [max(-most, min(region.start, most)) for region in self.regions]
        starts += [0] * (MOST_REGIONS - len(starts))
        return {
            **{f"start_{n}": start for n, start in enumerate(starts)},
            "granularity": min(self.call.granularity, most),
            "window": min(window, most) if self._windowed() else None,
        }


def _contiguous(x: Tensor) -> Shape:
    """Strides of tokens with nothing between them."""
    return x.shape[-2] * x.shape[-1], x.shape[-1], 1


def _check_offsets(x: Tensor) -> None:
    if x.stride(-3) * MOST_ROWS >= 2**31 and x.shape[-3] > 1:
        raise ValueError(
            f"attention: tokens must lie less than {2**31 // MOST_ROWS} elements apart, "
            f"got strides {x.stride()}"
        )


def _parts(head_dim: int, halves: bool) -> tuple[int, int]:
    """The dims of both parts of a row: see rows.py."""
    whole = max(LEAST_DIMS, triton.next_power_of_2(head_dim))
    first = whole // 2
    if not halves or first < LEAST_DIMS:
        return whole, 0
    return first, max(LEAST_DIMS, triton.next_power_of_2(head_dim - first))
