"""From PyTorch tensors to launches of the attention kernels."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..._shared.attention_call import AttentionCall
from ..._shared.triton.launch import VECTOR_BYTES, strides_of
from .backward_keys import dkv_kernel
from .backward_queries import dq_kernel
from .configs import MOST_ROWS, Config, config
from .forward import forward_kernel
from .frames import empty, rotate, rows_of, unrotate
from .rows import Rows, Tile

LEAST_DIMS = 16  # of a product
MOST_REGIONS = 3


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of every region, in two launches.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
    (total, heads, head_dim) with call.cu_seqlens; v like k; all contiguous in the last dimension.
    Returns out like q and the natural log of the sum of exponentials, float32
    (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    launcher = _Launcher(*rotate(q, k, call), v, call)
    out = empty(q.shape, q.dtype, q.device)
    lse = empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.float32, q.device)
    launcher.launch("forward", out=launcher.rows(out), lse=lse)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of raw q and k, and of v, in their dtypes, in four launches.

    dout: like out, contiguous in the last dimension; dlse: like lse, or None; the rest as in
    `forward`.
    """
    launcher = _Launcher(*rotate(q, k, call), v, call, dout, out)
    regions = len(launcher.q)
    lse, delta = lse.contiguous(), empty(lse.shape, torch.float32, q.device)
    dq, dk = (empty((regions, *x.shape), torch.float32, q.device).unbind() for x in (q, k))
    dv = empty(v.shape, v.dtype, v.device)
    given = {"dout": launcher.rows(dout), "lse": lse, "delta": delta}
    launcher.launch(
        "dq",
        **given,
        out=launcher.rows(out),
        dlse=None if dlse is None else dlse.contiguous(),
        dq=tuple(map(launcher.rows, dq)),
    )
    launcher.launch("dkv", **given, dk=tuple(map(launcher.rows, dk)), dv=launcher.rows(dv))
    return *unrotate(dq, dk, q, k, call), dv


class _Launcher:
    """The arguments that all kernels on frames of one call share."""

    def __init__(
        self, q: list[Tensor], k: list[Tensor], v: Tensor, call: AttentionCall, *others: Tensor
    ) -> None:
        self.call, self.like = call, q[0]
        self.batch = 1 if call.cu_seqlens is not None else v.shape[0]
        self.seqlen_q, self.heads_q, self.head_dim = q[0].shape[-3:]
        self.seqlen_k, self.heads_k, _ = v.shape[-3:]
        strides = [n for x in (*q, *k, v, *others) for n in strides_of(x)[:-1]]
        self.align = math.gcd(VECTOR_BYTES // v.itemsize, *strides)
        self.q, self.k = tuple(map(self.rows, q)), tuple(map(self.rows, k))
        self.v = self.rows(v)
        self.starts = self._starts()

    def rows(self, x: Tensor) -> Rows:
        rows = rows_of(x, self.align)
        if rows.seq * self.align * MOST_ROWS >= 2**31:
            raise ValueError(
                f"attention: tokens must lie less than {2**31 // MOST_ROWS} elements apart, "
                f"got strides {x.stride()}"
            )
        return rows

    def launch(self, name: str, **tensors) -> None:
        """Launch "forward" or "dq", a program for each block of queries, or "dkv", of keys."""
        setting = self._setting(name)
        size, seqlen, heads = setting.block_m, self.seqlen_q, self.heads_q
        if name == "dkv":
            size, seqlen, heads = setting.block_n, self.seqlen_k, self.heads_k
        blocks, extent = self._extent(size, seqlen)
        if blocks * heads * self.batch == 0:
            return
        kernel = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}[name]
        with torch.cuda.device_of(self.like):
            kernel[(blocks * heads * self.batch,)](
                q=self.q,
                k=self.k,
                v=self.v,
                **tensors,
                **extent,
                blocks=blocks,
                heads_q=self.heads_q,
                group=self.heads_q // self.heads_k,
                rows=self.seqlen_q,
                seqlen_q=self.seqlen_q,
                seqlen_k=self.seqlen_k,
                **{f"start_{region}": start for region, start in enumerate(self.starts)},
                granularity=min(self.call.granularity, max(self.seqlen_k, 1)),
                softmax_scale=self.call.scale(self.head_dim),
                TILE=self._tile(setting),
                num_warps=setting.warps,
                num_stages=setting.stages,
                enable_fp_fusion=True,
            )

    def _setting(self, name: str) -> Config:
        capability = None if _interpreted() else _capability(self.like.device)
        return config(name, self.head_dim, self.like.itemsize, capability)

    def _tile(self, setting: Config) -> Tile:
        dims, more_dims = _parts(self.head_dim, setting.halves)
        return Tile(
            block_m=setting.block_m,
            block_n=setting.block_n,
            head_dim=self.head_dim,
            dims=dims,
            more_dims=more_dims,
            regions=len(self.q),
            from_first_key=self.starts[0] <= -self.seqlen_k,
            align=self.align,
            widen=_interpreted() and self.like.dtype == torch.bfloat16,
        )

    def _extent(self, size: int, seqlen: int) -> tuple[int, dict]:
        """The number of blocks (at most), and where the sequences' blocks start."""
        blocks, cu_seqlens = triton.cdiv(seqlen, size), self.call.cu_seqlens
        block_starts, sequences = None, 0
        if cu_seqlens is not None:
            sequences = cu_seqlens.shape[0] - 1
            blocks += sequences  # each may end in a part of a block
            block_starts = _block_starts(cu_seqlens, size)
        return blocks, {
            "cu_seqlens": cu_seqlens,
            "block_starts": block_starts,
            "num_sequences": sequences,
            "search_steps": sequences.bit_length(),
        }

    def _starts(self) -> list[int]:
        """No larger than the sequence: int32 then never overflows."""
        most = max(self.seqlen_k, 1)
        regions = self.call.trimmed(self.seqlen_k)
        starts = [max(-most, min(region.start, most)) for region in regions]
        return starts + [0] * (MOST_REGIONS - len(starts))


def _interpreted() -> bool:
    return not isinstance(forward_kernel, triton.JITFunction)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _parts(head_dim: int, halves: bool) -> tuple[int, int]:
    """The dims of both parts of a row: see rows.py."""
    whole = max(LEAST_DIMS, triton.next_power_of_2(head_dim))
    first = whole // 2
    if not halves or first < LEAST_DIMS:
        return whole, 0
    return first, max(LEAST_DIMS, triton.next_power_of_2(head_dim - first))


def _block_starts(cu_seqlens: Tensor, size: int) -> Tensor:
    """(sequences + 1,) int32: how many blocks of `size` rows lie before each sequence."""
    blocks = (cu_seqlens.diff() + (size - 1)) // size
    return torch.nn.functional.pad(blocks.cumsum(0, dtype=torch.int32), (1, 0))
