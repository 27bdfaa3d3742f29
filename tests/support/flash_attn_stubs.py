"""Modules with parameters of the real flash-attention packages, which run on PyTorch.

Names, those that a call here may use, are as in flash-attn 2.8.3, hopper/ of its repository in
2026-10, and flash-attn-4 4.0.0b36: a call with another one fails as it would there.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from attention_engines import TorchEngine

_FA2_MASK = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap"
_SAVED = "dout, q, k, v, out, softmax_lse"
_PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_PACKED_OR_NOT = (
    "cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None"
)
_FA3_MASK = "window_size_left=-1, window_size_right=-1, softcap=0.0"
_FA4_MASK = "causal=False, window_size=(None, None), softcap=0.0, return_lse=False"

SIGNATURES = {
    "flash_attn.flash_attn_interface": {
        "_flash_attn_forward": f"q, k, v, {_FA2_MASK}, alibi_slopes, return_softmax",
        "_flash_attn_varlen_forward": (
            f"q, k, v, {_PACKED}, dropout_p, softmax_scale, causal, window_size_left=-1, "
            "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False"
        ),
        "_flash_attn_backward": f"{_SAVED}, dq, dk, dv, {_FA2_MASK}, alibi_slopes, deterministic",
        "_flash_attn_varlen_backward": (
            f"{_SAVED}, dq, dk, dv, {_PACKED}, {_FA2_MASK}, alibi_slopes, deterministic"
        ),
    },
    "flash_attn_interface": {
        "_flash_attn_forward": f"q, k, v, {_PACKED_OR_NOT}, causal=False, {_FA3_MASK}",
        "_flash_attn_backward": (
            f"{_SAVED}, {_PACKED_OR_NOT}, dq=None, dk=None, dv=None, is_causal=False, {_FA3_MASK}, "
            "deterministic=False"
        ),
    },
    "flash_attn.cute.interface": {
        "flash_attn_func": f"q, k, v, softmax_scale=None, {_FA4_MASK}",
        "flash_attn_varlen_func": f"q, k, v, {_PACKED_OR_NOT}, {_FA4_MASK}",
        "_flash_attn_bwd": (
            f"q, k, v, out, dout, lse, {_PACKED_OR_NOT}, causal=False, softcap=0.0, "
            "window_size_left=None, window_size_right=None, deterministic=False, dlse=None"
        ),
    },
}


def stub_modules() -> dict[str, ModuleType]:
    """Every name of sys.modules that the packages would fill."""
    modules = {}
    for module_name, functions in SIGNATURES.items():
        module = modules[module_name] = ModuleType(module_name)
        newest = module_name == "flash_attn.cute.interface"
        run = _Newest() if newest else _Older()
        for name, parameters in functions.items():
            handler = run.backward if "bwd" in name or "backward" in name else run.forward
            scope = {"handler": handler, "SimpleNamespace": SimpleNamespace}
            source = f"lambda {parameters}: handler(SimpleNamespace(**locals()))"
            setattr(module, name, eval(source, scope))
    return modules


class _Older:
    """Causal calls, windows whose negative left bound is infinite, gradients written in place."""

    engine = TorchEngine("older")

    def forward(self, call):
        assert call.causal and call.window_size_right == 0
        out, lse = self.engine.forward(call.q, call.k, call.v, *self._band(call))
        return out, lse, out.new_empty(0), None

    def backward(self, call):
        assert getattr(call, "causal", True) and getattr(call, "is_causal", True)
        assert call.deterministic and call.window_size_right == 0
        saved = (call.q, call.k, call.v, call.out, call.softmax_lse)
        grads = self.engine.backward(call.dout, None, *saved, *self._band(call))
        for target, grad in zip((call.dq, call.dk, call.dv), grads):
            assert target.is_contiguous()
            target.copy_(grad)

    def _band(self, call):
        _check(call)
        left = None if call.window_size_left < 0 else call.window_size_left
        return call.softmax_scale, left, 0, getattr(call, "cu_seqlens_q", None), call.softcap


class _Newest:
    """Windows with bounds of any sign, a gradient of lse, gradients returned."""

    engine = TorchEngine("newest", negative_right=True, dlse=True)

    def forward(self, call):
        _check(call)
        assert call.return_lse and not call.causal
        cu_seqlens = getattr(call, "cu_seqlens_q", None)
        band = (call.softmax_scale, *call.window_size, cu_seqlens, call.softcap)
        return self.engine.forward(call.q, call.k, call.v, *band)

    def backward(self, call):
        _check(call)
        assert call.deterministic and not call.causal
        saved = (call.q, call.k, call.v, call.out, call.lse)
        window = (call.window_size_left, call.window_size_right)
        band = (call.softmax_scale, *window, call.cu_seqlens_q, call.softcap)
        return self.engine.backward(call.dout, call.dlse, *saved, *band)


def _check(call) -> None:
    """What the packages ask of tensors."""
    assert call.q.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
    assert call.q.shape[-1] % 8 == 0
    for x in (call.q, call.k, call.v):
        assert x.stride(-1) == 1
    cu_seqlens = getattr(call, "cu_seqlens_q", None)
    if cu_seqlens is not None:
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        assert call.max_seqlen_q >= cu_seqlens.diff().max()
