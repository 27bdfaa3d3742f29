"""One small interface to the flash-attention packages.

An engine computes attention within a band: query i sees the keys i - left <= j <= i. Positions are
aligned at the end of the sequences. left None is unbounded; softcap 0 is none; lse is a natural
logarithm. The backward takes any lse and out, not only those of its own forward.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor


class Engine:
    """The interface of an engine.

    q: (batch, seqlen_q, heads_q, head_dim); k, v: (batch, seqlen_k, heads_k, head_dim). With
    cu_seqlens (sequences + 1,) int32, the same for q and k: (total, heads, head_dim).
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim = 256
    takes_dlse = False  # its backward takes a gradient of lse

    def missing(self) -> str | None:
        """Return why the package cannot be imported; None if it can."""
        raise NotImplementedError

    def refuses(self, capability: tuple[int, int], head_dim: int) -> str | None:
        """Return why forward or a repeatable backward cannot run there; None if they can."""
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        left: int | None,
        cu_seqlens: Tensor | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """Return out like q, and lse (batch, heads_q, seqlen_q) or (heads_q, total)."""
        raise NotImplementedError

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        softmax_scale: float,
        left: int | None,
        cu_seqlens: Tensor | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv in the dtype of q; dlse is None unless `takes_dlse`."""
        raise NotImplementedError


class _Package(Engine):
    """An engine in an installed package, imported on first use."""

    module: str

    def missing(self) -> str | None:
        try:
            self._functions()
        except Exception as error:  # a package for other versions may raise anything
            if self.module.startswith(getattr(error, "name", None) or "no module"):
                return "is not installed (optional)"
            return f"cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return None

    def _functions(self):
        return importlib.import_module(self.module)


class FlashAttention2(_Package):
    """The package flash-attn 2.8, https://github.com/Dao-AILab/flash-attention."""

    name = "flash-attn 2"
    module = "flash_attn.flash_attn_interface"

    def refuses(self, capability, head_dim):
        if capability < (8, 0):
            return f"needs compute capability 8.0, got {capability[0]}.{capability[1]}"
        return None

    def forward(self, q, k, v, softmax_scale, left, cu_seqlens, softcap):
        functions, common = self._functions(), self._common(softmax_scale, left, softcap)
        common["return_softmax"] = False
        if cu_seqlens is None:
            return functions._flash_attn_forward(q, k, v, **common)[:2]
        packed = _packed(q, cu_seqlens)
        return functions._flash_attn_varlen_forward(q, k, v, **packed, **common)[:2]

    def backward(self, dout, dlse, q, k, v, out, lse, softmax_scale, left, cu_seqlens, softcap):
        functions, common = self._functions(), self._common(softmax_scale, left, softcap)
        grads = _empty_grads(q, k, v)
        common.update(deterministic=True, **grads)
        saved = (dout, q, k, v, out, lse)
        if cu_seqlens is None:
            functions._flash_attn_backward(*saved, **common)
        else:
            packed = _packed(q, cu_seqlens)
            functions._flash_attn_varlen_backward(*saved, **packed, **common)
        return tuple(grads.values())

    def _common(self, softmax_scale, left, softcap):
        return {
            "dropout_p": 0.0,
            "softmax_scale": softmax_scale,
            "causal": True,
            "window_size_left": -1 if left is None else left,
            "window_size_right": 0,
            "softcap": softcap,
            "alibi_slopes": None,
        }


class FlashAttention3(_Package):
    """The same repository's hopper/ folder; not on PyPI, but PyTorch publishes wheels."""

    name = "flash-attn 3"
    module = "flash_attn_interface"
    max_head_dim = 192  # beyond, its backward refuses to be deterministic

    def refuses(self, capability, head_dim):
        if capability[0] != 9:
            return f"needs compute capability 9.x, got {capability[0]}.{capability[1]}"
        return None

    def forward(self, q, k, v, softmax_scale, left, cu_seqlens, softcap):
        return self._functions()._flash_attn_forward(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            causal=True,
            window_size_left=-1 if left is None else left,
            window_size_right=0,
            softcap=softcap,
            **_packed(q, cu_seqlens),
        )[:2]

    def backward(self, dout, dlse, q, k, v, out, lse, softmax_scale, left, cu_seqlens, softcap):
        grads = _empty_grads(q, k, v)
        self._functions()._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            softmax_scale=softmax_scale,
            is_causal=True,
            window_size_left=-1 if left is None else left,
            window_size_right=0,
            softcap=softcap,
            deterministic=True,
            **_packed(q, cu_seqlens),
            **grads,
        )
        return tuple(grads.values())


class FlashAttention4(_Package):
    """The same repository's flash_attn/cute folder, package flash-attn-4."""

    name = "flash-attn 4"
    module = "flash_attn.cute.interface"
    takes_dlse = True

    def refuses(self, capability, head_dim):
        if capability[0] not in (9, 10, 11):
            return (
                "has a repeatable backward on compute capability 9.x to 11.x, "
                f"got {capability[0]}.{capability[1]}"
            )
        if capability[0] > 9 and head_dim > 128:
            # Its forward takes 256 too, but its backward has no window there.
            return f"takes windows up to head_dim 128 there, got {head_dim}"
        return None

    def forward(self, q, k, v, softmax_scale, left, cu_seqlens, softcap):
        functions = self._functions()
        call = functions.flash_attn_func
        if cu_seqlens is not None:
            call = functions.flash_attn_varlen_func
        with torch.cuda.device_of(q):
            return call(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                causal=False,
                window_size=(left, 0),
                softcap=softcap,
                return_lse=True,
                **_packed(q, cu_seqlens),
            )[:2]

    def backward(self, dout, dlse, q, k, v, out, lse, softmax_scale, left, cu_seqlens, softcap):
        with torch.cuda.device_of(q):
            return self._functions()._flash_attn_bwd(
                q,
                k,
                v,
                out,
                dout,
                lse,
                softmax_scale=softmax_scale,
                causal=False,
                window_size_left=left,
                window_size_right=0,
                softcap=softcap,
                deterministic=True,
                dlse=dlse,
                **_packed(q, cu_seqlens),
            )[:3]


ENGINES: tuple[Engine, ...] = (FlashAttention4(), FlashAttention3(), FlashAttention2())


def _packed(q: Tensor, cu_seqlens: Tensor | None) -> dict:
    """Return a packed call's arguments; total bounds the longest sequence without a GPU read."""
    if cu_seqlens is None:
        return {}
    total = q.shape[0]
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": total,
        "max_seqlen_k": total,
    }


def _empty_grads(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Allocate contiguous gradients, whatever the strides of q, k and v."""
    return {f"d{name}": x.new_empty(x.shape) for name, x in (("q", q), ("k", k), ("v", v))}


# -------------------------------------------------------------------------------------------------
# Choice


def missing() -> str | None:
    """Return why no engine can run on this machine; None if one can."""
    if not torch.cuda.is_available():
        return "flash-attention needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    reasons = [why_not(engine, capability, head_dim=64) for engine in ENGINES]
    return "; ".join(reasons) if all(reasons) else None


@functools.cache
def why_not(engine: Engine, capability: tuple[int, int], head_dim: int) -> str | None:
    """Return, in a line, why an engine cannot run on such a GPU; None if it can."""
    why = engine.refuses(capability, head_dim)
    if head_dim > engine.max_head_dim:
        why = f"takes head_dim up to {engine.max_head_dim}, got {head_dim}"
    why = why or engine.missing()
    return None if why is None else f"{engine.name} {why}"


def best_engine(q: Tensor) -> Engine:
    """Return the newest installed engine that runs on q's GPU; NotImplementedError if none does."""
    if not q.is_cuda:
        raise NotImplementedError(f"flash_attn: q must be on a CUDA GPU, got {q.device}")
    capability = torch.cuda.get_device_capability(q.device)
    reasons = []
    for engine in ENGINES:
        why = why_not(engine, capability, q.shape[-1])
        if why is None:
            return engine
        reasons.append(why)
    raise NotImplementedError("flash_attn: " + "; ".join(reasons))
