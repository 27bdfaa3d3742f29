"""The op `permute_fwd`: schema, fake kernel, and the kernels that are launched from Python.

The compiled libraries register their kernels for the same schema (csrc/cpu/permute/bind.cpp,
csrc/cuda/permute/bind.cpp). `permute_fwd` runs what is best on the tensors' device,
`permute_fwd_triton` the Triton kernels alone. The backward is the same op with `inverse` flipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.library import library, load_on_first_use
from . import autograd, reference
from .power import resolve

# An Autograd kernel sees the positional tensors alone, hence all tensors before the *.
_FWD = (
    "(Tensor q, Tensor? k, Tensor permutations, Tensor? positions=None, Tensor? cu_seqlens=None, "
    "*, SymInt offset=0, bool inverse=False) -> (Tensor, Tensor)"
)


def _fwd_fake(q, k, *more, **options) -> tuple[Tensor, Tensor]:
    resolve(q, k, *more, **options)
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _fwd_triton(q, k, *more, **options) -> tuple[Tensor, Tensor]:
    from .triton import permute_fwd

    return permute_fwd(q, k, *more, **options)


def _define() -> None:
    for suffix in ("", "_triton"):
        tags = (torch.Tag.needs_fixed_stride_order,)
        library.define(f"permute_fwd{suffix}{_FWD}", tags=tags)
        torch.library.register_fake(f"{library.ns}::permute_fwd{suffix}", _fwd_fake, lib=library)
        autograd.register(library, suffix)
    library.impl("permute_fwd_triton", _fwd_triton, "CUDA")
    library.impl("permute_fwd_triton", _fwd_triton, "CPU")  # the interpreter
    fallbacks = {"cpu": reference.permute_fwd, "cuda": _fwd_triton}
    load_on_first_use({device: {"permute_fwd": one} for device, one in fallbacks.items()})


_define()
