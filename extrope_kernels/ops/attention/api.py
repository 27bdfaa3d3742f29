"""From a public function's arguments to an op, or to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._shared import backends as _backends
from . import flash_attn, reference
from .arguments import check, check_bool, check_boundaries
from .frames import Call, rotate
from .regions import ReRope, Score

BACKENDS = ("reference", "cpu", "triton", "flash_attn")


def attend(
    score_name: str,
    score: Score,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    return_lse: bool,
    backend: str | None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the score method `score_name` ("rerope", ...) with the fields of `Call` as options."""
    name = f"{score_name}_attention"
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"{name}: freqs must be a RopeFreqs, got {type(freqs).__name__}")
    if freqs.axes is not None:
        raise ValueError(f"{name}: freqs must have no axes (mRoPE), got some")
    check_bool(name, "return_lse", return_lse)
    cu_seqlens = options.pop("cu_seqlens")
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    options["attention_factor"] = freqs.attention_factor
    by = (freqs.inv_freq, cu_seqlens, freqs.log_decay)
    call = Call(score, *by, **options)
    check(name, q, k, v, call)
    if backend is not None:
        _backends.require(name, backend, BACKENDS, q.device.type, missing)
    if backend == "reference":
        if not torch.compiler.is_compiling():
            check_boundaries(name, cu_seqlens, q)
        frames = rotate(q, k, call)
        out, lse = reference.forward(frames.q, frames.k, v, frames.layout)
    else:
        suffix = f"_{backend}" if backend in ("triton", "flash_attn") else ""
        op = getattr(torch.ops.extrope, f"{score_name}_attn_fwd{suffix}")
        out, lse = op(q, k, v, *by, **_own(score), **options)
    return (out, lse) if return_lse else out


def missing(backend: str, device: str | None = None) -> str | None:
    """None when `backend` can run here, else the reason in one line."""
    return flash_attn.missing() if backend == "flash_attn" else _backends.missing(backend, device)


missing._dynamo_marked_constant = True


def _own(score: Score) -> dict:
    own = {name: getattr(score, name) for name in score.__match_args__}
    if isinstance(score, ReRope) and score.factor == float("inf"):
        del own["factor"]  # a schema's default cannot be infinite
    return own


def backends() -> dict[str, str]:
    """What each backend says of itself here: "available", or why it is not."""
    return {name: missing(name) or "available" for name in BACKENDS}
