"""The op `permute_fwd`: schema, fake kernel, and the kernels that are launched from Python.

The reference runs on every device. The backward is the same op with `inverse` turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import library
from . import autograd, reference
from .power import resolve

# An Autograd kernel sees the positional tensors alone, hence all tensors before the *.
_FWD = (
    "(Tensor q, Tensor? k, Tensor permutations, Tensor? positions=None, Tensor? cu_seqlens=None, "
    "*, SymInt offset=0, bool inverse=False) -> (Tensor, Tensor)"
)


def _fwd_fake(q, k, *by, **options) -> tuple[Tensor, Tensor]:
    resolve(q, k, *by, **options)
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _define() -> None:
    for suffix in ("",):
        tags = (torch.Tag.needs_fixed_stride_order,)
        library.define(f"permute_fwd{suffix}{_FWD}", tags=tags)
        torch.library.register_fake(f"extrope::permute_fwd{suffix}", _fwd_fake, lib=library)
        autograd.register(library, suffix)
    library.impl("permute_fwd", reference.permute_fwd, "CPU")
    library.impl("permute_fwd", reference.permute_fwd, "CUDA")


_define()
