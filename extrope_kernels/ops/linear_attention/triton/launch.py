"""From a `Scan` on PyTorch tensors to launches of its kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..._shared.triton.launch import INTERPRETED, chip_of
from ..scan import FEATURE_EPS, Scan, Scanned
from .configs import MAX_CHUNK, Config, config
from .kernels import scan_kernel, state_kernel, state_passing_kernel
from .rows import Numbers, Rows, Tile

LEAST_BLOCK = 16  # of a product
PASSING_BLOCK = 1024


def scan(q: Tensor, k: Tensor, v: Tensor, how: Scan) -> Scanned:
    """See ..scan; float32, bfloat16 or float16, accumulated in float32."""
    return _Call(q, k, v, how).run()


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total), float32."""
    return torch.linalg.vecdot(x.float(), y.float()).transpose(-1, -2).contiguous()


class _Call:
    """The tensors and sizes of one scan."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, how: Scan) -> None:
        self.q, self.k, self.v, self.how = q, k, v, how
        self.packed = how.cu_seqlens is not None
        self.batch = 1 if self.packed else q.shape[0]
        self.seqlen = q.shape[-3]
        self.setting = config(q.shape[-1], v.shape[-1], q.itemsize, chip_of(q))
        part = self.setting.chunk * self.setting.chunks
        self.log2_decay = None if how.decay is None else how.decay.double().log2().float()
        self.parts = triton.cdiv(self.seqlen, part)
        self.part_starts, self.sequences = None, 0
        if self.packed:
            self.sequences = how.cu_seqlens.shape[0] - 1
            self.parts += self.sequences  # each may end in a piece of a part
            counts = (how.cu_seqlens.diff() + (part - 1)) // part
            starts = counts.cumsum(0, dtype=torch.int32)
            self.part_starts = torch.nn.functional.pad(starts, (1, 0))
        self.parts = max(self.parts, 1)
        self.tile = self._tile(self.setting, part)

    def run(self) -> Scanned:
        how, q, shape = self.how, self.q, self._state_shape()
        heads = max(q.shape[-2], how.heads)
        out = torch.empty(
            (*q.shape[:-2], heads, self.v.shape[-1]),
            dtype=torch.float32 if how.out_is_float else q.dtype,
            device=q.device,
        )
        rows = q.shape[:-1].numel() if how.normalize else 0
        den = self._empty(rows)
        if how.normalize:
            den = den.view(*q.shape[:-3], q.shape[-2], self.seqlen)
        last = [self._empty(0), self._empty(0)]
        if how.keep_state:
            last = [self._empty(self.batch, how.heads, *shape[i]) for i in range(2)]
        self._launch(out, den, last)
        return Scanned(out, den, *last)

    @property
    def one_part(self) -> bool:
        """Whether a state is that of the caller: rows see no other part."""
        return self.how.causal and self.parts == 1

    def _state_shape(self) -> tuple[tuple[int, ...], ...]:
        dim, value_dim = self.q.shape[-1], self.v.shape[-1]
        return (dim, value_dim), (dim,), (value_dim,)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def _launch(self, out: Tensor, den: Tensor, last: list[Tensor]) -> None:
        how, blocks = self.how, triton.cdiv(self.v.shape[-1], self.tile.block_v)
        programs = self.batch * self.parts * out.shape[-2]
        if programs * self.seqlen == 0:
            for state, first in zip(last, (how.first_state, how.first_sum)):
                state.zero_() if first is None else state.copy_(first)
            return
        with torch.cuda.device_of(out):
            scan_kernel[(programs, blocks)](
                _rows(self.q), _rows(self.k), _rows(self.v), _rows(out), _rows(how.gate),
                _numbers(how.q_scale), _numbers(how.q_extra), _numbers(how.k_scale),
                _numbers(how.k_extra), den, self.log2_decay, self._states(blocks),
                (*last, None) if how.keep_state else None,
                **self._extent(), **self._options(),
            )  # fmt: skip

    def _states(self, blocks: int) -> tuple | None:
        """The states that the parts start from; None for zero."""
        how = self.how
        first = (how.first_state, how.first_sum, None)
        if self.one_part:
            return None if how.first_state is None else first
        slots = self.batch * self.parts * how.heads
        wanted = (True, self.tile.key_sum, self.tile.extra)
        states = tuple(
            self._empty(slots, *shape) if want else None
            for shape, want in zip(self._state_shape(), wanted)
        )
        options = self._options()
        if self.q.dtype == torch.float32:
            # Eight warps spill on sm_90, and one stage on sm_100.
            options |= {"num_warps": 4, "num_stages": 2}
        state_kernel[(slots, blocks)](
            _rows(self.k), _rows(self.v), _numbers(how.k_scale), _numbers(how.k_extra),
            self.log2_decay, states, **self._extent(), **options,
        )  # fmt: skip
        sequences = self.sequences if self.packed else self.batch
        for state, start in zip(states, first):
            if state is not None:
                size = state[0].numel()
                state_passing_kernel[(sequences * how.heads, triton.cdiv(size, PASSING_BLOCK))](
                    state, start, self.log2_decay, self.part_starts, self.parts, how.heads, size,
                    BLOCK=PASSING_BLOCK, TILE=self.tile, enable_fp_fusion=True,
                )  # fmt: skip
        return states

    def _extent(self) -> dict:
        return {
            "cu_seqlens": self.how.cu_seqlens,
            "part_starts": self.part_starts,
            "num_sequences": self.sequences,
            "search_steps": self.sequences.bit_length(),
            "parts": self.parts,
            "heads": self.how.heads,
            "seqlen": self.seqlen,
        }

    def _options(self) -> dict:
        return {
            "TILE": self.tile,
            "num_warps": self.setting.warps,
            "num_stages": self.setting.stages,
            "enable_fp_fusion": True,
        }

    def _tile(self, setting: Config, part: int) -> Tile:
        how, dim, value_dim = self.how, self.q.shape[-1], self.v.shape[-1]
        return Tile(
            chunk=setting.chunk,
            part=part,
            score_dim=dim,
            block_d=max(LEAST_BLOCK, triton.next_power_of_2(dim)),
            value_dim=value_dim,
            block_v=min(max(LEAST_BLOCK, triton.next_power_of_2(value_dim)), setting.block_v),
            eps=FEATURE_EPS,
            phi_scores=how.phi_scores,
            causal=how.causal,
            reverse=how.reverse,
            extra=how.q_extra is not None or how.k_extra is not None,
            normalize=how.normalize,
            first_state=not self.one_part or how.first_state is not None,
            keep_state=how.keep_state,
            key_sum=how.normalize or how.keep_state,
            q_twice=setting.q_twice,
            widen=INTERPRETED and self.q.dtype == torch.bfloat16,
        )


def _rows(x: Tensor | None) -> Rows:
    if x is None:
        return Rows(None, 0, 0, 0, 1)
    strides = [0] * (4 - x.dim()) + list(x.stride())
    if strides[1] * MAX_CHUNK >= 2**31:
        raise ValueError(
            f"linear_attn: tokens must lie less than {2**31 // MAX_CHUNK} elements apart, "
            f"got strides {x.stride()}"
        )
    return Rows(x, *strides[:3], x.shape[-2])


def _numbers(x: Tensor | None) -> Numbers:
    return Numbers(x, 1 if x is None else x.shape[-2])
