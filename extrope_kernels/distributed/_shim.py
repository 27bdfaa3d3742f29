"""Stands in for the new ops.attention until it lands; deleted then."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ..ops._shared import attention_call as ac
from ..ops._shared import backends as _backends
from ..ops._shared.checks import refuse_flags
from ..ops._shared.library import ops
from ..ops.attention import reference
from ..ops.attention.api import BACKENDS, missing, run
from ..ops.attention.checks import check as _check
from ..scores import FIRST_KEY, PositionMap, Region, Score

SAME = PositionMap()
PLAIN = Score("rope_attention", (Region(FIRST_KEY, SAME, SAME),), stored=SAME)
TENSORS = ("inv_freq", "cu_seqlens", "log_decay", "sinks", "query_scale", "q_start", "k_start")


@dataclass(frozen=True)
class AttentionCall(ac.AttentionCall):
    def first_key(self, query: int) -> int:
        first = query // self.granularity * self.granularity + self.starts[0]
        window = self.sliding_window
        return first if window is None else max(first, query + 1 - window)

    def queries_end(self, end: int) -> int:
        last = -((self.starts[0] - end) // self.granularity) * self.granularity
        window = self.sliding_window
        return last if window is None else min(last, end + window - 1)


def name_of(score):
    return "rope_attention" if score is None else score.name


def describe(
    freqs, score, *, softmax_scale, log_n, query_scale, softcap, sinks, sliding_window, cu_seqlens,
    interleaved, return_lse, keys_stored,
):  # fmt: skip
    import torch

    op = name_of(score)
    refuse_flags(op, interleaved=interleaved, return_lse=return_lse)
    ac.check_freqs(op, freqs)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    options = ac.score_options(score or PLAIN, stored=keys_stored)
    options |= ac.rope_options(
        op, freqs, softmax_scale, log_n, interleaved, softcap, sliding_window
    )
    return AttentionCall(freqs.inv_freq, cu_seqlens, freqs.log_decay, sinks, query_scale, **options)


def check(op, q, k, v, call, backend):
    _check(op, q, k, v, call)
    if backend is not None:
        _backends.require(op, backend, BACKENDS, q.device.type, missing)


def _options(call):
    every = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return [every.pop(n) for n in TENSORS], every


def forward(q, k, v, call, backend):
    tensors, options = _options(call)
    return run("rope_attention", (q, k, v, *tensors), options, backend)


def backward(dout, dlse, q, k, v, out, lse, call, backend):
    given = (dout, dlse, q, k, v, out, lse)
    if backend == "reference" or (backend in (None, "cpu") and q.dtype.itemsize == 8):
        return reference.backward(*given, call)
    tensors, options = _options(call)
    suffix = f"_{backend}" if backend in ("triton", "flash_attn") else ""
    return getattr(ops, f"attention_bwd{suffix}")(*given, *tensors, **options)


def on_one_device(q, k, v, freqs, score=None, **options):
    from ..ops.attention import attend

    return attend(score or PLAIN, q, k, v, freqs, **options)
