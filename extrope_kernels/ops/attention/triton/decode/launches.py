"""What a call over a key/value cache launches, for tensors of one layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...._shared.fp8 import as_bits
from ...._shared.triton.launch import Plan


class DecodeLaunches(NamedTuple):
    """What a call launches, and what it allocates."""

    append: Plan | None
    decode: Plan | None  # None where there is nothing to attend with
    out: tuple[int, ...]
    lse: tuple[int, ...]
    scratch: int = 0
    counters: int = 0

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        inv_freq: Tensor,
        seqlens: Tensor,
        block_table: Tensor | None = None,
        leftpad: Tensor | None = None,
        log_decay: Tensor | None = None,
        sinks: Tensor | None = None,
        query_scale: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """With tensors of the layout that it was made for, in the order of the op."""
        out = q.new_empty(self.out)
        lse = q.new_empty(self.lse, dtype=torch.float32)
        if k_scale is not None:
            k_cache, v_cache = as_bits(k_cache), as_bits(v_cache)
        cached = (k_cache, v_cache, inv_freq, seqlens, block_table, leftpad, log_decay)
        scales = (k_scale, v_scale)
        scratch = q.new_empty(self.scratch, dtype=torch.float32) if self.scratch else None
        if self.append is not None:
            self.append(k, v, *cached, cu_seqlens_q, *scales, scratch)
        elif scratch is not None:
            scratch.narrow(0, 0, self.counters).zero_()
        if self.decode is not None:
            sinks = None if sinks is None else sinks.contiguous()  # kernels take it without strides
            of_queries = (sinks, query_scale, cu_seqlens_q)
            self.decode(q, *cached, *of_queries, *scales, out, lse, scratch)
        return out, lse
