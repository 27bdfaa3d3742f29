"""The ops `merge_fwd` and `merge_inplace`: schemas, fake kernels, and who runs them.

The CPU library registers its kernels for the same schemas (csrc/cpu/merge/bind.cpp); on a GPU
Triton's serve, and without Triton PyTorch's operations. `NAME_triton` is the Triton kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._shared.backends import missing
from ..._shared.library import library, load_on_first_use
from . import autograd, reference
from .checks import check

_SCHEMAS = {
    "merge_fwd": "(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
    # The first set, which is written over, and the others.
    "merge_inplace": "(Tensor(a!) out, Tensor(b!) lse, Tensor[] outs, Tensor[] lses) -> ()",
}


def _fwd_fake(outs, lses) -> tuple[Tensor, Tensor]:
    check(outs, lses, inplace=False)
    return torch.empty_like(outs[0]), lses[0].new_empty(lses[0].shape)


def _inplace_fake(out, lse, outs, lses) -> None:
    check((out, *outs), (lse, *lses), inplace=True)


def _triton(name: str) -> Callable[..., Any]:
    def kernel(*args):
        from ..triton import merge

        return getattr(merge, name)(*args)

    return kernel


def _on_gpu(name: str) -> Callable[..., Any]:
    by_triton, by_torch = _triton(name), getattr(reference, name)
    return lambda *args: (by_torch if missing("triton", "cuda") else by_triton)(*args)


def _define() -> None:
    fakes = {"merge_fwd": _fwd_fake, "merge_inplace": _inplace_fake}
    for suffix in ("", "_triton"):
        for name, schema in _SCHEMAS.items():
            tags = (torch.Tag.needs_fixed_stride_order,)
            library.define(f"{name}{suffix}{schema}", tags=tags)
            torch.library.register_fake(f"{library.ns}::{name}{suffix}", fakes[name], lib=library)
        autograd.register(library, suffix)
    for name in _SCHEMAS:
        library.impl(name, _on_gpu(name), "CUDA")
        for key in ("CPU", "CUDA"):  # on a CPU: the interpreter
            library.impl(f"{name}_triton", _triton(name), key)
    load_on_first_use({"cpu": {name: getattr(reference, name) for name in _SCHEMAS}})


_define()
