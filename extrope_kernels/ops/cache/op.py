"""The op of the append to a key/value cache: rotation, and the write of keys and values.

The CPU library registers its kernel for `rope_append` (csrc/cpu/cache/bind.cpp); on a GPU the op
runs Triton's. `rope_append_triton` always runs Triton's.
"""

from __future__ import annotations

from .._math.maps import SCHEMA
from .._torch.autograd import empty_rows, refuse_backward
from .._torch.library import define, imported_when_called, library, ops
from ..rope.call import OPTIONS
from . import reference
from .call import check, read_append

# The map, if there is one, is that by which a score method stores keys.
_MAP = ", ".join(x for name, x in SCHEMA.items() if name != "map_rows")
_MAP = _MAP.replace("int[] map_kinds", "int[]? map_kinds=None")
# Positions are those of slots or tokens, so there is no offset, and nothing is undone.
_OF_ROPE = ", ".join(x for name, x in OPTIONS.items() if name not in ("offset", "inverse"))
_SCHEMA = (
    "(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? inv_freq, "
    "Tensor? cache_seqlens=None, Tensor? block_table=None, Tensor? slot_mapping=None, "
    "Tensor? positions=None, Tensor? cu_seqlens=None, Tensor? cache_leftpad=None, "
    "Tensor? log_decay=None, Tensor? k_scale=None, Tensor? v_scale=None, *, "
    f"{_MAP}, {_OF_ROPE}) -> Tensor"
)


def _fake(*tensors, **options):
    call = read_append(*tensors, **options)
    check("rope_append", call)
    return call.k.new_empty(0) if call.q is None else empty_rows(call.q)


def _define() -> None:
    kernels = {
        "reference": reference.rope_append,
        "triton": imported_when_called(f"{__package__}.triton.append", "rope_append"),
    }
    message = "rope_append: is for inference and has no gradient"
    for suffix in define("rope_append", _SCHEMA, _fake, kernels):
        op = getattr(ops, f"rope_append{suffix}").default
        refuse_backward(library, op, message, lambda tensors: tensors[3:5])


_define()
