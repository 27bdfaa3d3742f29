"""Modules with the parameters of the real flash-attention packages, which run on PyTorch.

Parameter names as in flash-attn 2.8.3, hopper/ of its repository in 2026-10, and flash-attn-4
4.0.0b36. A call with a name that the real function lacks fails here as it would there.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from attention_engines import TorchEngine

_FA2_MASK = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap"
_FA2_SAVED = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
_CU_SEQLENS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_CU_SEQLENS_OR_NOT = "cu_seqlens_q=None, cu_seqlens_k=None"
_FA4_MODS = "score_mod=None, score_mod_bwd=None, mask_mod=None"
_FA4_GATHER = "gather_bwd_recompute_p=False, gather_bwd_token_chunk=None"

SIGNATURES = {
    "flash_attn.flash_attn_interface": {
        "_flash_attn_forward": f"q, k, v, {_FA2_MASK}, alibi_slopes, return_softmax",
        "_flash_attn_varlen_forward": (
            f"q, k, v, {_CU_SEQLENS}, dropout_p, softmax_scale, causal, window_size_left=-1, "
            "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
            "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False"
        ),
        "_flash_attn_backward": (
            f"{_FA2_SAVED}, {_FA2_MASK}, alibi_slopes, deterministic, rng_state=None"
        ),
        "_flash_attn_varlen_backward": (
            f"{_FA2_SAVED}, {_CU_SEQLENS}, {_FA2_MASK}, alibi_slopes, deterministic, "
            "rng_state=None, zero_tensors=False"
        ),
    },
    "flash_attn_interface": {
        "_flash_attn_forward": (
            f"q, k, v, k_new=None, v_new=None, qv=None, out_=None, {_CU_SEQLENS_OR_NOT}, "
            "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
            "max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, "
            "rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
            "k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
            "window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, "
            "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, "
            "sm_margin=0"
        ),
        "_flash_attn_backward": (
            f"dout, q, k, v, out, softmax_lse, {_CU_SEQLENS_OR_NOT}, sequed_q=None, "
            "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
            "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
            "softcap=0.0, deterministic=False, sm_margin=0"
        ),
    },
    "flash_attn.cute.interface": {
        "flash_attn_func": (
            "q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, "
            "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
            f"pack_gqa=None, deterministic=False, {_FA4_MODS}, aux_tensors=None, "
            "aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, "
            f"return_lse=False, {_FA4_GATHER}"
        ),
        "flash_attn_varlen_func": (
            f"q, k, v, qv=None, {_CU_SEQLENS_OR_NOT}, max_seqlen_q=None, max_seqlen_k=None, "
            "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, "
            "page_table=None, softmax_scale=None, causal=False, window_size=(None, None), "
            "learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
            f"{_FA4_MODS}, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
            "return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, "
            f"disable_scheduler_metadata=False, {_FA4_GATHER}"
        ),
        "_flash_attn_bwd": (
            "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
            "window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, "
            "num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, "
            "dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, "
            f"AtomLayoutMdQ=2, V_in_regs=False, {_CU_SEQLENS_OR_NOT}, seqused_q=None, "
            "seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, "
            f"dk=None, dv=None, {_FA4_MODS}, aux_tensors=None, aux_scalars=None, "
            "block_sparse_tensors=None, dlse=None, learnable_sink=None"
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
