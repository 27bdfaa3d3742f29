"""The gradient of the angles from the Triton rotation, on a GPU or interpreted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from rope_oracle import (
    DEVICE,
    Guarded,
    assert_rotated,
    exact,
    guarded_like,
    randn,
    rope_rotation,
)

from extrope_kernels.ops.rope import reference
from extrope_kernels.ops.rope.pairs import accumulator, cross
from extrope_kernels.ops.rope.rotation import Rotation
from extrope_kernels.ops.rope.triton import rotate

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))


def backward(saved: list[torch.Tensor], grads: list[torch.Tensor], rotation: Rotation):
    """dx and angle_grad from the kernel, with guards around both."""
    outputs = [guarded_like(x) for x in grads]
    heads = grads[0].shape[2] if rotation.per_head else 1
    half = rotation.rotary_dim // 2
    batch, seqlen = grads[0].shape[:2]
    shape = (batch, seqlen, heads, half)
    contiguous = (seqlen * heads * half, heads * half, half, 1)
    angle_grad = Guarded(shape, contiguous, accumulator(grads[0].dtype))
    rotate(grads, [out.tensor for out in outputs], saved, angle_grad.tensor, rotation)
    for buffer in (*outputs, angle_grad):
        buffer.assert_untouched_around()
    return [out.tensor for out in outputs], angle_grad.tensor


@LAYOUTS
@pytest.mark.parametrize("per_head", (False, True), ids=("shared", "per head"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angle_grad(dtype, per_head, interleaved):
    saved = [randn(2, 3, 3, 16, dtype=dtype), randn(2, 3, 3, 16, dtype=dtype)]
    grads = [randn(2, 3, 3, 16, dtype=dtype), randn(2, 3, 3, 16, dtype=dtype)]
    rotation = rope_rotation(12, conjugate=True, interleaved=interleaved, offset=500)
    if per_head:
        inv_freq = rotation.inv_freq * torch.rand(1, 3, 1, device=DEVICE)
        rotation = replace(rotation, inv_freq=inv_freq)
    dx, angle_grad = backward(saved, grads, rotation)

    wide = accumulator(dtype)
    layout = (12, interleaved, per_head)
    widened = reference.rotate([g.to(wide) for g in grads], rotation)
    same_dtype = sum(cross(x, d, *layout) for x, d in zip(saved, widened, strict=True))
    want_dx = exact(grads, rotation)
    first, second = (np.s_[0:12:2], np.s_[1:12:2]) if interleaved else (np.s_[0:6], np.s_[6:12])
    want = 0
    for x, d in zip(saved, want_dx, strict=True):
        x = x.double().cpu().numpy().astype(np.longdouble)
        want = want + x[..., first] * d[..., second] - x[..., second] * d[..., first]
    if not per_head:
        want = want.sum(axis=2, keepdims=True)
    assert_rotated("angle_grad", angle_grad, same_dtype, want)
    for name, got, ref, ideal in zip(
        ("dq", "dk"), dx, reference.rotate(grads, rotation), want_dx, strict=True
    ):
        assert_rotated(name, got, ref, ideal)


def test_angle_grad_is_the_derivative_of_the_frequencies():
    rotation = rope_rotation(8, offset=3, amplitude=1.5)
    log_decay = -torch.rand(4, device=DEVICE) / 50
    rotation = replace(rotation, inv_freq=rotation.inv_freq.double(), log_decay=log_decay)
    x, grad = randn(2, 5, 3, 8, dtype=torch.float64), randn(2, 5, 3, 8, dtype=torch.float64)
    _, angle_grad = backward([x], [grad], replace(rotation, conjugate=True))
    positions = torch.arange(3, 8, device=DEVICE).double()
    inv_freq = rotation.inv_freq.clone().requires_grad_()
    reference.rotate([x], replace(rotation, inv_freq=inv_freq))[0].backward(grad)
    torch.testing.assert_close(
        torch.einsum("s,bshi->i", positions, angle_grad), inv_freq.grad.flatten()
    )


def test_angle_grad_over_many_tokens_and_heads():
    saved, grads = [randn(1, 37, 9, 16)], [randn(1, 37, 9, 16)]
    rotation = rope_rotation(16, conjugate=True)
    angle_grad = backward(saved, grads, rotation)[1]
    same_dtype = cross(saved[0], reference.rotate(grads, rotation)[0], 16, False, False)
    x, d = saved[0].double().cpu().numpy().astype(np.longdouble), exact(grads, rotation)[0]
    want = (x[..., :8] * d[..., 8:] - x[..., 8:] * d[..., :8]).sum(axis=2, keepdims=True)
    assert_rotated("angle_grad", angle_grad, same_dtype, want)
