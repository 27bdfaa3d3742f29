"""The op `rope_cos_sin`: the rotation by given cosines and sines.

Layers of transformers pass such tables to their attention, in the model's dtype. `rope_fwd`
computes its own from angles in float64: prefer it if you have frequencies. The CPU library
registers its kernel for the same schema (csrc/cpu/rope/bind.cpp); on a GPU Triton's runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.autograd import contiguous_rows, register_backward
from .._shared.checks import DTYPES, check_matching, check_rows
from .._shared.dtypes import accumulator
from .._shared.library import library, load_on_first_use, ops
from .._shared.pairs import join_pairs, split_pairs, with_rotated
from .op import like, triton_kernels

NAME = "rope_cos_sin"
_SCHEMA = (
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, *, bool interleaved=False, "
    "bool conjugate=False) -> (Tensor, Tensor)"
)


def apply_cos_sin(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by given cosines and sines, in one pass; differentiable in q and k.

    q, k: (batch, seqlen, heads, head_dim), k with its own number of heads, or None; float32,
        bfloat16, float16 or float64, any strides with a contiguous last dimension.
    cos, sin: (batch or 1, seqlen, rotary_dim / 2), one per pair of dims, in any of these dtypes;
        they include any amplitude. Dims past rotary_dim pass through.
    interleaved: pair i is dims (2i, 2i + 1), else (i, i + rotary_dim / 2).

    Returns: q and k, rotated; an empty tensor if k is None. Computed in float32 (float64 for
        float64) and rounded once.

    Raises ValueError, or RuntimeError from the compiled library, for tensors that do not fit.
    """
    return ops.rope_cos_sin(q, k, cos, sin, interleaved=interleaved)


def check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError with the argument's name for anything that kernels cannot take."""
    check_rows("rope", "q", q, packed=False)
    if k is not None:
        check_rows("rope", "k", k, packed=False)
        check_matching("rope", q, k)
    batch, seqlen, _, head_dim = q.shape
    fits = cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == seqlen
    if not (fits and 1 <= cos.shape[2] <= head_dim // 2):
        raise ValueError(
            f"rope: cos must be ({batch} or 1, {seqlen}, rotary_dim/2) with rotary_dim <= "
            f"head_dim {head_dim}, got {tuple(cos.shape)}"
        )
    if (sin.shape, sin.dtype) != (cos.shape, cos.dtype):
        raise ValueError(
            f"rope: sin must have cos's dtype and shape {cos.dtype} {tuple(cos.shape)}, "
            f"got {sin.dtype} {tuple(sin.shape)}"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in DTYPES or x.device != q.device or x.layout != torch.strided:
            raise ValueError(
                f"rope: {name} must be dense float32, bfloat16, float16 or float64 on q's device "
                f"{q.device}, got {x.layout} {x.dtype} on {x.device}"
            )
        if x.shape[2] > 1 and x.stride(2) != 1 and x.numel() > 0:
            raise ValueError(
                f"rope: {name} must be contiguous in its last dimension, got strides {x.stride()}"
            )


def reference(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_cos_sin` in plain PyTorch."""
    check(q, k, cos, sin)
    dim, wide = 2 * cos.shape[2], accumulator(q.dtype)
    c, s = (x.to(wide).unsqueeze(2) for x in (cos, -sin if conjugate else sin))

    def rotated(x: Tensor) -> Tensor:
        a, b = split_pairs(x.to(wide), dim, interleaved)
        dims = join_pairs(a * c - b * s, b * c + a * s, interleaved)
        return with_rotated(x, dims)

    return rotated(q), rotated(k) if k is not None else q.new_empty(0)


def _fake(q, k, cos, sin, **options):
    check(q, k, cos, sin)
    return like(q, q), like(k, q)


def _register_gradient(op) -> None:
    """Register the gradient: the rotation by minus the angle, which can be derived again."""

    def save(ctx, args, options, outputs):
        q, k, cos, sin = args
        if cos.requires_grad or sin.requires_grad:
            raise NotImplementedError(
                f"{NAME}: cos and sin must not require grad, got one that does"
            )
        ctx.options = options | {"conjugate": not options.get("conjugate", False)}
        ctx.shapes = (q.shape, None if k is None else k.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)

    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        some = next((x for x in grads if x is not None), None)
        if some is None:
            return None, None
        of_q, of_k = (
            None if shape is None else (some.new_zeros(shape) if x is None else contiguous_rows(x))
            for x, shape in zip(grads, ctx.shapes)
        )
        dq, dk = op(of_q, of_k, cos, sin, **ctx.options)
        return dq, None if of_k is None else dk

    register_backward(library, op, save, backward)


def _define() -> None:
    by_triton = triton_kernels("cos_sin", (NAME,))[NAME]
    for suffix in ("", "_triton"):
        library.define(f"{NAME}{suffix}{_SCHEMA}", tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{library.ns}::{NAME}{suffix}", _fake, lib=library)
        _register_gradient(getattr(ops, NAME + suffix).default)
    library.impl(f"{NAME}_triton", by_triton, "CUDA")
    library.impl(f"{NAME}_triton", by_triton, "CPU")  # the interpreter
    library.impl(NAME, by_triton, "CUDA")
    load_on_first_use({"cpu": {NAME: reference}})


_define()
