"""The op of the append to a key/value cache: rotation, and the write of keys and values.

The CPU library registers its kernel for `rope_append` (csrc/cpu/cache/bind.cpp); on a GPU the op
runs Triton's. `rope_append_triton` always runs Triton's.
"""

from __future__ import annotations

import torch

from .._math.maps import SCHEMA
from .._torch.autograd import empty_rows, refuse_backward
from .._torch.library import library, load_on_first_use, ops
from . import reference
from .call import check, read_append

# The map, if there is one, is that by which a score method stores keys.
_MAP = ", ".join(x for name, x in SCHEMA.items() if name != "map_rows")
_MAP = _MAP.replace("int[] map_kinds", "int[]? map_kinds=None")
_SCHEMA = (
    "(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? inv_freq, "
    "Tensor? cache_seqlens=None, Tensor? block_table=None, Tensor? slot_mapping=None, "
    "Tensor? positions=None, Tensor? cu_seqlens=None, Tensor? cache_leftpad=None, "
    "Tensor? log_decay=None, Tensor? k_scale=None, Tensor? v_scale=None, *, "
    f"{_MAP}, float attention_factor=1.0, bool interleaved=False, int? rotary_offset=None, "
    "float decay_origin=0.0) -> Tensor"
)


def _fake(*tensors, **options):
    call = read_append(*tensors, **options)
    check("rope_append", call)
    return call.k.new_empty(0) if call.q is None else empty_rows(call.q)


def _triton(*args, **options):
    from .triton.append import rope_append

    return rope_append(*args, **options)


def _define() -> None:
    for suffix in ("", "_triton"):
        name = f"rope_append{suffix}"
        library.define(name + _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{library.ns}::{name}", _fake, lib=library)
        op = getattr(ops, name).default
        message = "rope_append: is for inference and has no gradient"
        refuse_backward(library, op, message, lambda tensors: tensors[3:5])
    library.impl("rope_append_triton", _triton, "CUDA")
    library.impl("rope_append_triton", _triton, "CPU")  # the interpreter
    library.impl("rope_append", _triton, "CUDA")
    load_on_first_use({"cpu": {"rope_append": reference.rope_append}})


_define()
