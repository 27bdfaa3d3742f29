"""The Triton rotation and its angle gradient, on a GPU or interpreted."""

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
    check,
    exact,
    guarded_like,
    randn,
    rope_rotation,
)

from extrope_kernels.ops._shared.dtypes import accumulator
from extrope_kernels.ops.rope import reference
from extrope_kernels.ops.rope.rotation import Rotation, cross
from extrope_kernels.ops.rope.triton import launch, rotate

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_partial_rotary(dtype, interleaved):
    q, k = randn(2, 3, 3, 64, dtype=dtype), randn(2, 3, 1, 64, dtype=dtype)
    rotation = rope_rotation(48, interleaved=interleaved, amplitude=1.2079, offset=1003)
    outputs = check([q, k], rotation)
    for x, out in zip((q, k), outputs, strict=True):
        assert torch.equal(out[..., 48:], x[..., 48:])


@LAYOUTS
@pytest.mark.parametrize("head_dim", (2, 8, 64, 72, 80, 96, 128, 256))
def test_every_head_dim(head_dim, interleaved):
    q, k = randn(1, 5, 2, head_dim), randn(1, 5, 1, head_dim)
    check([q, k], rope_rotation(head_dim, interleaved=interleaved, offset=77))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_conjugate(dtype, interleaved):
    rotation = rope_rotation(24, interleaved=interleaved, conjugate=True, offset=100_000)
    x = randn(2, 3, 2, 40, dtype=dtype)
    inside = guarded_like(x)
    inside.tensor.copy_(x)
    rotate([inside.tensor], [inside.tensor], None, None, rotation)
    want = exact([x], rotation)[0]
    assert_rotated("q", inside.tensor, reference.rotate([x], rotation)[0], want)
    assert torch.equal(inside.tensor[..., 24:], x[..., 24:])
    inside.assert_untouched_around()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_many_tokens_take_wide_tiles(dtype):
    q, k = randn(1, 521, 2, 64, dtype=dtype), randn(1, 521, 1, 64, dtype=dtype)
    check([q, k], rope_rotation(64))


@pytest.mark.parametrize("seqlen", (1, 2, 13))
def test_tokens_of_a_tile_may_lie_in_several_sequences(seqlen):
    check([randn(3, seqlen, 1, 8)], rope_rotation(8, offset=5))


@pytest.mark.parametrize("heads", (1, 73))
def test_heads(heads):
    check([randn(1, 1, heads, 16), randn(1, 1, 1, 16)], rope_rotation(16, offset=9))


def test_more_heads_of_k_than_of_q():
    check([randn(1, 2, 1, 16), randn(1, 2, 5, 16)], rope_rotation(16, offset=9))


@pytest.mark.parametrize(
    "shape", ((0, 4, 2, 16), (2, 0, 2, 16), (2, 4, 0, 16)), ids=("batch", "seqlen", "heads")
)
def test_nothing_to_do_launches_nothing(shape, monkeypatch):
    monkeypatch.setattr(launch, "rotate_kernel", None)
    x = randn(*shape)
    angle_grad = torch.full((*shape[:2], 1, 8), torch.nan, device=DEVICE)
    rotate([x], [torch.empty_like(x)], [x], angle_grad, rope_rotation(16))
    assert torch.equal(angle_grad, torch.zeros_like(angle_grad))


# Positions


@pytest.mark.parametrize("largest", (1e3, 1e5, 1e6, 1.6e7))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64, torch.float32, torch.float64), ids=str)
def test_explicit_positions(dtype, largest):
    positions = torch.rand(2, 8, device=DEVICE, dtype=torch.float64) * 50 + (largest - 50)
    q, k = randn(2, 8, 1, 64), randn(2, 8, 1, 64)
    check([q, k], rope_rotation(64, positions=positions.to(dtype)))


def test_positions_broadcast_over_the_batch_and_skip():
    positions = torch.randint(0, 100_000, (1, 12), device=DEVICE)[:, ::3]
    check([randn(2, 4, 1, 16)], rope_rotation(16, positions=positions, offset=-7))


def test_offset_past_32_bits():
    rotation = rope_rotation(16, offset=2**33 + 1)
    check([randn(1, 3, 1, 16)], replace(rotation, inv_freq=rotation.inv_freq * 1e-4))


@pytest.mark.parametrize("dtype", (torch.int64, torch.float32), ids=str)
def test_offset_per_sequence(dtype):
    offsets = torch.tensor([5, 100_000, 0], device=DEVICE, dtype=dtype)
    rotation = rope_rotation(16, positions=offsets, positions_are_offsets=True, offset=3)
    check([randn(3, 4, 1, 16), randn(3, 4, 2, 16)], rotation)


# Frequencies and amplitudes


@pytest.mark.parametrize("sequences, heads", ((3, 1), (1, 2), (3, 2)))
def test_frequencies_per_sequence_and_head(sequences, heads):
    rotation = rope_rotation(16, offset=1000)
    inv_freq = rotation.inv_freq * torch.rand(sequences, heads, 1, device=DEVICE)
    rotation = replace(rotation, inv_freq=inv_freq)
    check([randn(3, 2, 2, 16), randn(3, 2, 2, 16)], rotation)


def test_expanded_and_float64_frequencies():
    rotation = rope_rotation(16, offset=1000)
    rotation = replace(rotation, inv_freq=rotation.inv_freq.double().expand(2, 3, 8))
    check([randn(2, 2, 3, 16)], rotation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signs", ((1.0, -1.0), (-1.0, 1.0)), ids=("forward", "inverse"))
def test_log_decay(dtype, signs):
    log_decay = -torch.rand(8, device=DEVICE) / 512
    rotation = rope_rotation(16, log_decay=log_decay, decay_signs=signs, amplitude=0.77, offset=900)
    check([randn(2, 3, 2, 16, dtype=dtype), randn(2, 3, 1, 16, dtype=dtype)], rotation)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf
def test_log_decay_far_out_vanishes_or_overflows():
    log_decay = torch.tensor([-0.01, -1.0], device=DEVICE)
    rotation = rope_rotation(4, log_decay=log_decay, offset=10_000_000)
    x = torch.ones(1, 1, 1, 4, device=DEVICE)
    q, k = torch.empty_like(x), torch.empty_like(x)
    rotate([x, x], [q, k], None, None, rotation)
    assert (q == 0).all()
    assert not k.isfinite().any()


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
