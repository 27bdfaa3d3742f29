"""The ops of the rotation: schemas, fake kernels, and the kernels that are launched from Python.

The compiled libraries register their kernels for the same schemas (csrc/cpu/rope/bind.cpp,
csrc/cuda/rope/bind.cpp). `rope_*` runs what is best on the tensors' device, `rope_*_triton` the
Triton kernels alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .._shared.autograd import refuse_recording
from .._shared.dtypes import accumulator
from .._shared.library import library, load_on_first_use, ops
from . import autograd, reference
from .checks import INPLACE
from .rotation import resolve

# An Autograd kernel sees the positional tensors alone, hence all tensors before the *. axes matters
# to positions of shape (axes, batch, seqlen) only: others are the same on every axis.
ROPE_TENSORS = (
    "Tensor inv_freq, Tensor? positions=None, Tensor? cu_seqlens=None, Tensor? log_decay=None, "
    "Tensor? axes=None"
)
ROPE_OPTIONS = (
    "float attention_factor=1.0, SymInt offset=0, bool interleaved=False, bool inverse=False, "
    "float decay_origin=0.0"
)
_ROPE_ARGS = f"{ROPE_TENSORS}, *, {ROPE_OPTIONS}"
_FWD = f"(Tensor q, Tensor? k, {_ROPE_ARGS}) -> (Tensor, Tensor)"
_BWD = (
    f"(Tensor grad_q, Tensor? grad_k, Tensor? q, Tensor? k, {_ROPE_ARGS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_INPLACE = f"(Tensor(a!) q, Tensor(b!)? k, {_ROPE_ARGS}) -> ()"


# -------------------------------------------------------------------------------------------------
# Outputs, eager and fake alike


def like(x: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None else torch.empty_like(x)


def _fwd_fake(q, k, *rope_args, **options):
    resolve(q, k, *rope_args, adjoint=False, **options)
    return like(q, q), like(k, q)


def _bwd_fake(grad_q, grad_k, q, k, *rope_args, **options):
    tensors, rotation = resolve(grad_q, grad_k, *rope_args, adjoint=True, **options)
    return like(grad_q, grad_q), like(grad_k, grad_q), _angle_grad(q, tensors, rotation)


def _inplace_fake(q, k, *rope_args, **options):
    resolve(q, k, *rope_args, adjoint=False, **options)


def _angle_grad(saved: Tensor | None, tensors, rotation) -> Tensor:
    dtype = accumulator(tensors[0].dtype)
    if saved is None:
        return tensors[0].new_empty(0, dtype=dtype)
    batch, seqlen, heads, _ = tensors[0].shape
    shape = (batch, seqlen, heads if rotation.per_head else 1, rotation.inv_freq.shape[-1])
    return tensors[0].new_empty(shape, dtype=dtype)


def triton_kernels(module: str, names: tuple[str, ...]) -> dict[str, Callable]:
    """The ops' kernels in a module of triton/, which is imported when one is first called."""

    def kernel(name: str) -> Callable:
        @functools.cache
        def load():
            return getattr(importlib.import_module(f"{__package__}.triton.{module}"), name)

        return lambda *args, **options: load()(*args, **options)

    return {name: kernel(name) for name in names}


_TRITON = triton_kernels("ops", ("rope_fwd", "rope_bwd", "rope_inplace"))
_REFERENCE = {
    "rope_fwd": reference.rope_fwd,
    "rope_bwd": reference.rope_bwd,
    "rope_inplace": reference.rope_inplace,
}


def _define() -> None:
    for suffix in ("", "_triton"):
        for name, schema, fake in (
            ("rope_fwd", _FWD, _fwd_fake),
            ("rope_bwd", _BWD, _bwd_fake),
            ("rope_inplace", _INPLACE, _inplace_fake),
        ):
            library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{library.ns}::{name}{suffix}", fake, lib=library)
        autograd.register(library, suffix)
        refuse_recording(library, getattr(ops, f"rope_inplace{suffix}").default, INPLACE)
    library.define("cpu_capability() -> int")  # see cli.CPU_CAPABILITIES
    library.define("cpu_release_memory() -> int")  # bytes that freed results had left for others
    for name, function in _TRITON.items():
        library.impl(f"{name}_triton", function, "CUDA")
        library.impl(f"{name}_triton", function, "CPU")  # the interpreter
    load_on_first_use({"cpu": _REFERENCE, "cuda": _TRITON})


_define()
