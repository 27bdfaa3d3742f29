"""From a `Sweep` on PyTorch tensors to launches of its kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..sweep import FEATURE_EPS, Sweep, Swept
from .configs import MOST_TOKENS, Config, config
from .kernels import chain_kernel, gather_kernel, sweep_kernel
from .rows import Numbers, Rows, Tile

LEAST_LANES = 16  # of a product
CHAIN_BLOCK = 1024


def sweep(x: Tensor, y: Tensor, w: Tensor, by: Sweep) -> Swept:
    """See ..sweep; float32, bfloat16 or float16, accumulated in float32."""
    return _Call(x, y, w, by).run()


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total), float32."""
    return torch.linalg.vecdot(x.float(), y.float()).transpose(-1, -2).contiguous()


class _Call:
    """The tensors and sizes of one sweep."""

    def __init__(self, x: Tensor, y: Tensor, w: Tensor, by: Sweep) -> None:
        self.x, self.y, self.w, self.by = x, y, w, by
        self.packed = by.cu_seqlens is not None
        self.batch = 1 if self.packed else x.shape[0]
        self.seqlen = x.shape[-3]
        capability = None if _interpreted() else _capability(x.device)
        self.setting = config(x.shape[-1], w.shape[-1], x.itemsize, capability)
        self.tile = self._tile(self.setting)
        self.log2_decay = None if by.decay is None else by.decay.double().log2().float()
        self.parts = triton.cdiv(self.seqlen, self.tile.part)
        self.part_starts, self.sequences = None, 0
        if self.packed:
            self.sequences = by.cu_seqlens.shape[0] - 1
            self.parts += self.sequences  # each may end in a piece of a part
            counts = (by.cu_seqlens.diff() + (self.tile.part - 1)) // self.tile.part
            starts = counts.cumsum(0, dtype=torch.int32)
            self.part_starts = torch.nn.functional.pad(starts, (1, 0))
        self.parts = max(self.parts, 1)

    def run(self) -> Swept:
        by, x, shape = self.by, self.x, self._state_shape()
        heads = max(x.shape[-2], by.heads)
        out = torch.empty(
            (*x.shape[:-2], heads, self.w.shape[-1]),
            dtype=torch.float32 if by.out_is_float else x.dtype,
            device=x.device,
        )
        rows = x.shape[:-1].numel() if by.normalize else 0
        den = self._empty(rows)
        if by.normalize:
            den = den.view(*x.shape[:-3], x.shape[-2], self.seqlen)
        last = [self._empty(0), self._empty(0)]
        if by.keep_state:
            last = [self._empty(self.batch, by.heads, *shape[i]) for i in range(2)]
        self._launch(out, den, last)
        return Swept(out, den, *last)

    def _state_shape(self) -> tuple[tuple[int, ...], ...]:
        dim, value_dim = self.x.shape[-1], self.w.shape[-1]
        return (dim, value_dim), (dim,), (value_dim,)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def _launch(self, out: Tensor, den: Tensor, last: list[Tensor]) -> None:
        by, blocks = self.by, triton.cdiv(self.w.shape[-1], self.tile.value_lanes)
        programs = self.batch * self.parts * out.shape[-2]
        if programs * self.seqlen == 0:
            for state, first in zip(last, (by.first_state, by.first_sum)):
                state.zero_() if first is None else state.copy_(first)
            return
        with torch.cuda.device_of(out):
            sweep_kernel[(programs, blocks)](
                _rows(self.x), _rows(self.y), _rows(self.w), _rows(out), _rows(by.gate),
                _numbers(by.x_scale), _numbers(by.x_extra), _numbers(by.y_scale),
                _numbers(by.y_extra), den, self.log2_decay, self._states(blocks),
                (*last, None) if by.keep_state else None,
                **self._extent(), **self._options(),
            )  # fmt: skip

    def _states(self, blocks: int) -> tuple | None:
        """The states that the parts start from; None for zero."""
        by = self.by
        first = (by.first_state, by.first_sum, None)
        if by.causal and self.parts == 1:
            return None if by.first_state is None else first
        slots = self.batch * self.parts * by.heads
        wanted = (True, self.tile.key_sum, self.tile.extra)
        states = tuple(
            self._empty(slots, *shape) if want else None
            for shape, want in zip(self._state_shape(), wanted)
        )
        options = self._options()
        if self.x.dtype == torch.float32:
            # Eight warps spill on sm_90, and one stage on sm_100.
            options |= {"num_warps": 4, "num_stages": 2}
        gather_kernel[(slots, blocks)](
            _rows(self.y), _rows(self.w), _numbers(by.y_scale), _numbers(by.y_extra),
            self.log2_decay, states, **self._extent(), **options,
        )  # fmt: skip
        sequences = self.sequences if self.packed else self.batch
        for state, start in zip(states, first):
            if state is not None:
                size = state[0].numel()
                chain_kernel[(sequences * by.heads, triton.cdiv(size, CHAIN_BLOCK))](
                    state, start, self.log2_decay, self.part_starts, self.parts, by.heads, size,
                    BLOCK=CHAIN_BLOCK, TILE=self.tile, enable_fp_fusion=True,
                )  # fmt: skip
        return states

    def _extent(self) -> dict:
        return {
            "cu_seqlens": self.by.cu_seqlens,
            "part_starts": self.part_starts,
            "num_sequences": self.sequences,
            "search_steps": self.sequences.bit_length(),
            "parts": self.parts,
            "heads": self.by.heads,
            "seqlen": self.seqlen,
        }

    def _options(self) -> dict:
        return {
            "TILE": self.tile,
            "num_warps": self.setting.warps,
            "num_stages": self.setting.stages,
            "enable_fp_fusion": True,
        }

    def _tile(self, setting: Config) -> Tile:
        by, dim, value_dim = self.by, self.x.shape[-1], self.w.shape[-1]
        return Tile(
            chunk=setting.chunk,
            part=setting.chunk * setting.chunks,
            score_dim=dim,
            score_lanes=max(LEAST_LANES, triton.next_power_of_2(dim)),
            value_dim=value_dim,
            value_lanes=min(max(LEAST_LANES, triton.next_power_of_2(value_dim)), setting.lanes),
            eps=FEATURE_EPS,
            phi_scores=by.phi_scores,
            causal=by.causal,
            reverse=by.reverse,
            extra=by.x_extra is not None or by.y_extra is not None,
            normalize=by.normalize,
            key_sum=by.normalize or by.keep_state,
            x_twice=setting.x_twice,
            widen=_interpreted() and self.x.dtype == torch.bfloat16,
        )


def _rows(x: Tensor | None) -> Rows:
    if x is None:
        return Rows(None, 0, 0, 0, 1)
    strides = [0] * (4 - x.dim()) + list(x.stride())
    if strides[1] * MOST_TOKENS >= 2**31:
        raise ValueError(
            f"linear_attn: tokens must lie less than {2**31 // MOST_TOKENS} elements apart, "
            f"got strides {x.stride()}"
        )
    return Rows(x, *strides[:3], x.shape[-2])


def _numbers(x: Tensor | None) -> Numbers:
    return Numbers(x, 1 if x is None else x.shape[-2])


def _interpreted() -> bool:
    return not isinstance(sweep_kernel, triton.JITFunction)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
