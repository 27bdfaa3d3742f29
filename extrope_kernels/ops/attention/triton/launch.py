"""From PyTorch tensors to launches of the attention kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..regions import Layout
from .backward_keys import dkv_kernel
from .backward_queries import delta_kernel, dq_kernel
from .configs import MOST_ROWS, Config, config
from .forward import forward_kernel
from .rows import Rows, Tile

VECTOR_BYTES = 16
LEAST_LANES = 16  # of a product
MOST_REGIONS = 3


def forward(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Region attention: one softmax over the keys of every region.

    q, k: a rotated frame for each region, (batch, seqlen_q, heads_q, head_dim) and
    (batch, seqlen_k, heads_k, head_dim), or (total, heads, head_dim) with layout.cu_seqlens; v like
    k[0]; all contiguous in the last dimension. Returns out like q[0] and the natural log of the sum
    of exponentials, float32 (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    call = _Call(q, k, v, layout)
    out = _empty(q[0], q[0].dtype)
    lse = _empty(q[0][..., 0].transpose(-1, -2), torch.float32)
    call.launch("forward", out=call.rows(out), lse=lse)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of every frame of q and k (float32), and of v (in its dtype).

    dout: like out, contiguous in the last dimension; dlse: like lse, or None; the rest as in
    `forward`.
    """
    call = _Call(q, k, v, layout, dout, out)
    lse, delta = lse.contiguous(), _empty(lse, torch.float32)
    call.launch_delta(out, dout, None if dlse is None else dlse.contiguous(), lse, delta)
    dq, dk = ([_empty(x, torch.float32) for x in frames] for frames in (q, k))
    dv = _empty(v, v.dtype)
    given = {"dout": call.rows(dout), "lse": lse, "delta": delta}
    call.launch("dq", **given, dq=tuple(map(call.rows, dq)))
    call.launch("dkv", **given, dk=tuple(map(call.rows, dk)), dv=call.rows(dv))
    return dq, dk, dv


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(self, q, k, v: Tensor, layout: Layout, *others: Tensor) -> None:
        self.layout = layout
        self.like = q[0]
        self.batch = 1 if layout.cu_seqlens is not None else v.shape[0]
        self.seqlen_q, self.heads_q, self.head_dim = q[0].shape[-3:]
        self.seqlen_k, self.heads_k, _ = v.shape[-3:]
        strides = [n for x in (*q, *k, v, *others) for n in _strides(x)]
        self.align = math.gcd(VECTOR_BYTES // v.itemsize, *strides)
        self.frames = {"q": tuple(map(self.rows, q)), "k": tuple(map(self.rows, k))}
        self.v = self.rows(v)

    def rows(self, x: Tensor) -> Rows:
        batch, seq, head = _strides(x)
        if seq * MOST_ROWS >= 2**31:
            raise ValueError(
                f"attention: tokens must lie less than {2**31 // MOST_ROWS} elements apart, "
                f"got strides {x.stride()}"
            )
        return Rows(x, batch // self.align, seq // self.align, head // self.align)

    def launch(self, name: str, **tensors) -> None:
        """Launch "forward" or "dq", a program for each tile of queries, or "dkv", of keys."""
        setting = self._setting(name)
        size, seqlen, heads = setting.queries, self.seqlen_q, self.heads_q
        if name == "dkv":
            size, seqlen, heads = setting.keys, self.seqlen_k, self.heads_k
        tiles, extent = self._extent(size, seqlen)
        if tiles * heads * self.batch == 0:
            return
        kernel = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}[name]
        with torch.cuda.device_of(self.like):
            kernel[(tiles * heads * self.batch,)](
                **self.frames,
                v=self.v,
                **tensors,
                row_scale=self.layout.row_scale,
                **extent,
                tiles=tiles,
                heads_q=self.heads_q,
                group=self.heads_q // self.heads_k,
                rows=self.seqlen_q,
                seqlen_q=self.seqlen_q,
                seqlen_k=self.seqlen_k,
                **self._regions(),
                softmax_scale=self.layout.softmax_scale,
                TILE=self._tile(setting),
                num_warps=setting.warps,
                num_stages=setting.stages,
                enable_fp_fusion=True,
            )

    def launch_delta(self, out, dout, dlse, lse, delta) -> None:
        setting = self._setting("delta")
        tiles = triton.cdiv(self.seqlen_q, setting.queries)
        programs = tiles * self.heads_q * self.batch
        if programs == 0:
            return
        with torch.cuda.device_of(out):
            delta_kernel[(programs,)](
                self.rows(out),
                self.rows(dout),
                dlse,
                lse,
                delta,
                tiles,
                self.heads_q,
                self.seqlen_q,
                TILE=self._tile(setting),
                num_warps=setting.warps,
                enable_fp_fusion=True,
            )

    def _setting(self, name: str) -> Config:
        capability = None if _interpreted() else _capability(self.like.device)
        return config(name, self.head_dim, self.like.itemsize, capability)

    def _tile(self, setting: Config) -> Tile:
        lanes, more_lanes = _parts(self.head_dim, setting.halves)
        return Tile(
            queries=setting.queries,
            keys=setting.keys,
            head_dim=self.head_dim,
            lanes=lanes,
            more_lanes=more_lanes,
            regions=len(self.layout.starts),
            from_first_key=self.layout.starts[0] <= -self.seqlen_k,
            align=self.align,
            widen=_interpreted() and self.like.dtype == torch.bfloat16,
        )

    def _extent(self, size: int, seqlen: int) -> tuple[int, dict]:
        """The number of tiles (at most), and where the sequences' tiles start."""
        tiles, cu_seqlens = triton.cdiv(seqlen, size), self.layout.cu_seqlens
        tile_starts, sequences = None, 0
        if cu_seqlens is not None:
            sequences = cu_seqlens.shape[0] - 1
            tiles += sequences  # each may end in a part of a tile
            tile_starts = _tile_starts(cu_seqlens, size)
        return tiles, {
            "cu_seqlens": cu_seqlens,
            "tile_starts": tile_starts,
            "num_sequences": sequences,
            "search_steps": sequences.bit_length(),
        }

    def _regions(self) -> dict[str, int]:
        """Starts and granularity, no larger than the sequence: int32 then never overflows."""
        most = max(self.seqlen_k, 1)
        starts = [max(-most, min(start, most)) for start in self.layout.starts]
        starts += [0] * (MOST_REGIONS - len(starts))
        named = {f"start_{region}": start for region, start in enumerate(starts)}
        return {**named, "granularity": min(self.layout.granularity, most)}


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _interpreted() -> bool:
    return not isinstance(forward_kernel, triton.JITFunction)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _strides(x: Tensor) -> list[int]:
    """Strides of (batch, seq, head), 0 along dimensions of size 1: torch leaves those open."""
    strides = [0 if size == 1 else n for size, n in zip(x.shape, x.stride(), strict=True)]
    return [0] * (4 - x.dim()) + strides[:-1]


def _parts(head_dim: int, halves: bool) -> tuple[int, int]:
    """The lanes of both parts of a row: see rows.py."""
    whole = max(LEAST_LANES, triton.next_power_of_2(head_dim))
    first = whole // 2
    if not halves or first < LEAST_LANES:
        return whole, 0
    return first, max(LEAST_LANES, triton.next_power_of_2(head_dim - first))


def _tile_starts(cu_seqlens: Tensor, size: int) -> Tensor:
    """(sequences + 1,) int32: how many tiles of `size` rows lie before each sequence."""
    tiles = (cu_seqlens.diff() + (size - 1)) // size
    return torch.nn.functional.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
