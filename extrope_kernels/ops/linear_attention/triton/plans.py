"""Plans of one scan: its launches, settled for the layout of the tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._shared.triton.launch import INTERPRETED, Plan, chip_of, strides_of
from ..checks import check_dims
from ..scan import FEATURE_EPS, Scan
from .configs import MAX_CHUNK, config
from .kernels import scan_kernel, state_kernel, state_passing_kernel
from .prepare import BLOCK, prepare_kernel
from .rows import Tile

NAME = "linear_attn"
LEAST_BLOCK = 16  # of a product
PASSING_BLOCK = 1024
Shape = tuple[int, ...]
NO_ROWS = (0, 0, 0, 1)


class ScanPlans(NamedTuple):
    """Launches, shapes of what they write, and what Rows has beside its tensor."""

    prepare: Plan | None  # where there is a decay, or a boundary
    state: Plan | None  # where a part starts from a state that others leave
    passing: tuple[Plan | None, ...]  # of each of the states
    scan: Plan | None  # where there is a token
    keeps_state: bool
    out_dtype: torch.dtype
    out: Shape
    den: Shape
    last: tuple[Shape, Shape]
    states: tuple[Shape | None, ...]
    q: Shape
    k: Shape
    v: Shape
    out_rows: Shape
    gate: Shape


def scan_plans(q: Tensor, k: Tensor, v: Tensor, how: Scan) -> ScanPlans:
    """Of a scan whose tensors fit one another."""
    check_dims(NAME, q, v)
    layout = _Layout(q, k, v, how)
    some = layout.programs * layout.seqlen > 0
    out = q.new_empty(layout.out, device="meta")
    several = some and not layout.one_part
    states = layout.states() if several else ()
    prepared = some and (how.decay is not None or layout.packed)
    return ScanPlans(
        layout.prepare() if prepared else None,
        layout.state() if several else None,
        tuple(None if shape is None else layout.passing(shape) for shape in states),
        layout.scan() if some else None,
        how.keep_state,
        torch.float32 if how.out_is_float else q.dtype,
        layout.out,
        (*q.shape[:-3], q.shape[-2], layout.seqlen) if how.normalize else (0,),
        layout.last(),
        states,
        *(rows_of(x) for x in (q, k, v, out, how.gate)),
    )


class _Layout:
    """What all kernels of one scan are told."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, how: Scan) -> None:
        self.q, self.how = q, how
        self.packed = how.cu_seqlens is not None
        self.batch = 1 if self.packed else q.shape[0]
        self.seqlen, _, self.dim = q.shape[-3:]
        self.heads_k = k.shape[-2]
        self.value_dim = v.shape[-1]
        self.setting = config(self.dim, self.value_dim, q.itemsize, chip_of(q), how.phi_scores)
        self.part = self.setting.chunk * self.setting.chunks
        parts, self.sequences = triton.cdiv(self.seqlen, self.part), 0
        if self.packed:
            self.sequences = how.cu_seqlens.shape[0] - 1
            parts += self.sequences  # each may end in a piece of a part
        self.parts = max(parts, 1)
        self.out = (*q.shape[:-2], max(q.shape[-2], how.heads), self.value_dim)
        self.programs = self.batch * self.parts * self.out[-2]
        self.tile = self._tile()

    @property
    def one_part(self) -> bool:
        """Whether a state is that of the caller: rows see no other part."""
        return self.how.causal and self.parts == 1

    def states(self) -> tuple[Shape | None, ...]:
        """Shapes of the state, the key sum and the extra sum that each part starts from."""
        slots = self.batch * self.parts * self.how.heads
        dims = ((self.dim, self.value_dim), (self.dim,), (self.value_dim,))
        wanted = (True, self.tile.key_sum, self.tile.extra)
        return tuple((slots, *shape) if want else None for shape, want in zip(dims, wanted))

    def last(self) -> tuple[Shape, Shape]:
        """Shapes of what the last token leaves behind."""
        if not self.how.keep_state:
            return (0,), (0,)
        first = (self.batch, self.how.heads, self.dim)
        return (*first, self.value_dim), first

    def prepare(self) -> Plan:
        decay = self.how.decay
        return Plan(
            prepare_kernel,
            (1,),
            self.q,
            decay_stride=0 if decay is None else decay.stride(0),
            heads=self.how.heads,
            num_sequences=self.sequences,
            PART=self.part,
            BLOCK=BLOCK,
            num_warps=1,
        )

    def state(self) -> Plan:
        options = {}
        if self.q.dtype == torch.float32 and self.dim <= 128:
            # Eight warps spill in the gradient of k, four in wider rows.
            options = {"num_warps": 4, "num_stages": 2}
        return self._plan(state_kernel, self.batch * self.parts * self.how.heads, **options)

    def passing(self, states: Shape) -> Plan:
        sequences, heads = self.sequences if self.packed else self.batch, self.how.heads
        size = math.prod(states[1:])
        return Plan(
            state_passing_kernel,
            (sequences * heads, triton.cdiv(size, PASSING_BLOCK)),
            self.q,
            parts=self.parts,
            heads=heads,
            size=size,
            BLOCK=PASSING_BLOCK,
            TILE=self.tile,
        )

    def scan(self) -> Plan:
        return self._plan(scan_kernel, self.programs)

    def _plan(self, kernel: Any, programs: int, **options: int) -> Plan:
        """A program for each block of value dims, of each of `programs`."""
        setting = {"num_warps": self.setting.warps, "num_stages": self.setting.stages}
        return Plan(
            kernel,
            (programs, triton.cdiv(self.value_dim, self.tile.block_v)),
            self.q,
            num_sequences=self.sequences,
            search_steps=self.sequences.bit_length(),
            parts=self.parts,
            heads=self.how.heads,
            seqlen=self.seqlen,
            TILE=self.tile,
            **(setting | options),
        )

    def _tile(self) -> Tile:
        how, setting = self.how, self.setting
        return Tile(
            chunk=setting.chunk,
            part=self.part,
            score_dim=self.dim,
            block_d=max(LEAST_BLOCK, triton.next_power_of_2(self.dim)),
            value_dim=self.value_dim,
            block_v=min(max(LEAST_BLOCK, triton.next_power_of_2(self.value_dim)), setting.block_v),
            eps=FEATURE_EPS,
            phi_scores=how.phi_scores,
            causal=how.causal,
            reverse=how.reverse,
            extra=how.q_extra is not None or how.k_extra is not None,
            normalize=how.normalize,
            first_state=not self.one_part or how.first_state is not None,
            keep_state=how.keep_state,
            key_sum=how.normalize or how.keep_state,
            interpreted=INTERPRETED,
        )


def rows_of(x: Tensor | None) -> Shape:
    """The strides and heads that Rows has of x."""
    if x is None:
        return NO_ROWS
    strides = [0] * (4 - x.dim()) + list(strides_of(x))
    if strides[1] * MAX_CHUNK >= 2**31:
        raise ValueError(
            f"{NAME}: tokens must lie less than {2**31 // MAX_CHUNK} elements apart, "
            f"got strides {x.stride()}"
        )
    return (*strides[:3], x.shape[-2])
