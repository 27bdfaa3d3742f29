"""The op `rope_append`: schema, fake, and who runs it.

The CPU library registers its kernel for the same schema (csrc/cpu/append/bind.cpp).
`rope_append_triton` runs Triton's alone.
"""

from __future__ import annotations

import torch

from ..._shared.autograd import refuse_backward
from ..._shared.library import library, load_on_first_use, ops
from ..schema import triton_kernels
from . import reference
from .arguments import Append
from .checks import check

_TRITON = triton_kernels("append_ops", ("rope_append",))
# stored: the map of the positions that a score method stores keys at; q then stays unrotated.
_SCHEMA = (
    "(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor? q_norm_weight, Tensor? k_norm_weight, Tensor? inv_freq, Tensor? cache_seqlens=None, "
    "Tensor? block_table=None, Tensor? slot_mapping=None, Tensor? cu_seqlens=None, "
    "Tensor? cache_leftpad=None, Tensor? positions=None, Tensor? log_decay=None, "
    "Tensor? axes=None, Tensor? k_scale=None, Tensor? v_scale=None, *, "
    "float[] stored=[], float norm_eps=1e-6, float attention_factor=1.0, "
    "bool interleaved=False, float decay_origin=0.0) -> Tensor"
)


def _fake(*tensors, **options):
    call = Append(*tensors, **options)
    check("rope_append", call)
    return call.k.new_empty(0) if call.q is None else torch.empty_like(call.q)


def _define() -> None:
    for suffix in ("", "_triton"):
        name = f"rope_append{suffix}"
        library.define(name + _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{library.ns}::{name}", _fake, lib=library)
        op = getattr(ops, name).default
        message = "rope_append: is for inference and has no gradient"
        refuse_backward(library, op, message, lambda tensors: tensors[3:5])
    for key in ("CUDA", "CPU"):  # on a CPU: the interpreter
        library.impl("rope_append_triton", _TRITON["rope_append"], key)
    library.impl("rope_append", _TRITON["rope_append"], "CUDA")
    load_on_first_use({"cpu": {"rope_append": reference.rope_append}})


_define()
