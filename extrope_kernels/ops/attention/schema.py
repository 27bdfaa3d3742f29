"""The ops `<score>_attn_fwd` and `<score>_attn_bwd`: schemas, fakes, and who runs them.

`rerope_attn_fwd` runs what is best on the tensors' device; `rerope_attn_fwd_triton` and
`rerope_attn_fwd_flash_attn` run that implementation alone. Keys of a score method's own arguments
are the fields of its class in regions.py. All rotate with `torch.ops.extrope.rope_fwd` and attend
in regions.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._shared import backends as _backends
from . import autograd, cpu, flash_attn, reference
from .arguments import check, check_boundaries, check_head_dim
from .frames import Call, rotate
from .regions import BlockwiseCausal, DualChunk, ReRope

# An Autograd kernel sees the positional tensors alone, hence log_decay before the *.
_SCORES = {
    "rerope": (ReRope, "SymInt window, float? factor=None, bool grouped=False"),
    "dual_chunk": (DualChunk, "SymInt chunk_size, SymInt local_window"),
    "blockwise_causal": (BlockwiseCausal, "SymInt block_size"),
}
_BY = (
    "Tensor inv_freq, Tensor? cu_seqlens=None, Tensor? log_decay=None, *, {score}, "
    "float? softmax_scale=None, float? log_n=None, float attention_factor=1.0, "
    "bool interleaved=False, bool keys_stored=False"
)
_FWD = f"(Tensor q, Tensor k, Tensor v, {_BY}) -> (Tensor out, Tensor lse)"
_BWD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_BY}) -> (Tensor dq, Tensor dk, Tensor dv)"
)

_library = torch.library.Library("extrope", "FRAGMENT")


def make_call(
    score_class, inv_freq, cu_seqlens=None, log_decay=None, *, factor=None, **options
) -> Call:
    """A `Call` from an op's arguments."""
    own = {name: options.pop(name) for name in score_class.__match_args__ if name in options}
    if score_class is ReRope:
        own["factor"] = math.inf if factor is None else factor
    return Call(score_class(**own), inv_freq, cu_seqlens, log_decay, **options)


def _checked_call(name, score_class, q, k, v, by, options) -> Call:
    call = make_call(score_class, *by, **options)
    check(name, q, k, v, call)
    return call


def _empty_outputs(q: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=wide)


def _fwd_fake(name, score_class, q, k, v, *by, **options):
    call = _checked_call(name, score_class, q, k, v, by, options)
    return _empty_outputs(q, call.cu_seqlens is not None)


def _bwd_fake(name, score_class, dout, dlse, q, k, v, out, lse, *by, **options):
    _checked_call(name, score_class, q, k, v, by, options)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fwd(implementation, name, score_class, q, k, v, *by, **options):
    call = _checked_call(name, score_class, q, k, v, by, options)
    check_boundaries(name, call.cu_seqlens, q)
    run = _pick(implementation, name, q)
    # Every row of q is read once. Those of k are read by many tiles: in 16 bits, where products are
    # fast and frames small, they are turned beforehand.
    as_read = run is cpu
    frames = rotate(q, k, call, q_as_read=as_read, k_as_read=as_read and q.dtype == torch.float32)
    return run.forward(frames.q, frames.k, v, frames.layout)


def _bwd(implementation, name, score_class, dout, dlse, q, k, v, out, lse, *by, **options):
    call = _checked_call(name, score_class, q, k, v, by, options)
    run = _pick(implementation, name, q)
    as_read = run is cpu and q.dtype == torch.float32
    frames = rotate(q, k, call, q_as_read=as_read, k_as_read=as_read)
    dq, dk, dv = run.backward(dout, dlse, frames.q, frames.k, v, out, lse, frames.layout)
    return *frames.unrotate(dq, dk), dv


def _pick(implementation: str, name: str, q: Tensor):
    """The module that attends: float64 and a CPU without the compiled library go to the oracle."""
    if implementation == "cpu" and (q.dtype == torch.float64 or _backends.missing("cpu")):
        return reference
    check_head_dim(name, q)
    if implementation == "triton":
        from . import triton

        return triton
    return {"cpu": cpu, "flash_attn": flash_attn}[implementation]


def _define(score: str, score_class: type, own: str) -> None:
    by_suffix = {
        "": {"CPU": "cpu", "CUDA": "triton"},
        "_triton": {"CPU": "triton", "CUDA": "triton"},  # on a CPU: the interpreter
        "_flash_attn": {"CPU": "flash_attn", "CUDA": "flash_attn"},
    }
    name = f"{score}_attention"
    for suffix, implementations in by_suffix.items():
        for op, schema, fake, kernel in (
            (f"{score}_attn_fwd{suffix}", _FWD, _fwd_fake, _fwd),
            (f"{score}_attn_bwd{suffix}", _BWD, _bwd_fake, _bwd),
        ):
            tag = torch.Tag.needs_fixed_stride_order
            _library.define(op + schema.format(score=own), tags=(tag,))
            fake = functools.partial(fake, name, score_class)
            torch.library.register_fake(f"extrope::{op}", fake, lib=_library)
            for key, implementation in implementations.items():
                run = functools.partial(kernel, implementation, name, score_class)
                _library.impl(op, run, key)
        autograd.register(_library, score, suffix)


for _score, (_class, _own) in _SCORES.items():
    _define(_score, _class, _own)
