"""What the Triton rotation reads and writes, and its angle gradient, on a GPU or interpreted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from support.rope_oracle import (
    DEVICE,
    INTERPRETED,
    Guarded,
    assert_rotated,
    check,
    exact,
    guarded_like,
    randn,
    rope_rotation,
    rotate,
)

from extrope_kernels.ops._math.dtypes import accumulator
from extrope_kernels.ops._math.pairs import PairDims, cross
from extrope_kernels.ops._math.triton.launch import Launch
from extrope_kernels.ops.rope import reference
from extrope_kernels.ops.rope.call import Rotation

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


LAYOUTS = pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))


def cumulative(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def rows(*leading: int, pairs: int = 8) -> torch.Tensor:
    return torch.rand(*leading, pairs, device=DEVICE)


def test_every_way_to_say_positions_and_frequencies():
    """Each beside one that it goes with, on two tensors of (2, 5, 3, 20)."""
    places = torch.randint(0, 99_999, (2, 5), device=DEVICE)
    decay = {"log_decay": -rows(1)[0] / 9, "decay_origin": 3.5, "inv_freq": rows(1, 3)}
    axes = torch.arange(8, dtype=torch.int32, device=DEVICE) % 3
    for changes in (
        {"positions": places, "inv_freq": rows(2, 3), "rotary_offset": 3},
        {"positions": places[:1].double() + 0.25, "amplitude": 1.3, "interleaved": True},
        {"positions": places[:, 0], "positions_are_offsets": True, "inv_freq": rows(2, 1)},
        {"positions": torch.stack((places, places + 9, places * 3)), "axes": axes},
        {"positions": places[:1] % 99, "conjugate": True, "offset": 7, **decay},
    ):
        check([randn(2, 5, 3, 20), randn(2, 5, 3, 20)], rope_rotation(16, **changes))
    packed = {"cu_seqlens": cumulative(0, 2, 2, 5), "inv_freq": rows(3, 1)}
    offsets = {"positions": places[0, :3].float(), "positions_are_offsets": True}
    check([randn(1, 5, 3, 20), randn(1, 5, 1, 20)], rope_rotation(16, **packed, **offsets))


@LAYOUTS
@pytest.mark.parametrize("rotary_offset", (0, 8, 15))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_conjugate(dtype, rotary_offset, interleaved):
    by = {"interleaved": interleaved, "rotary_offset": rotary_offset}
    rotation = rope_rotation(24, **by, conjugate=True, offset=100_000)
    x = randn(2, 3, 2, 40, dtype=dtype)
    inside = guarded_like(x)
    inside.tensor.copy_(x)
    rotate([inside.tensor], [inside.tensor], None, None, rotation)
    want = exact([x], rotation)[0]
    assert_rotated("q", inside.tensor, reference.rotate([x], rotation)[0], want)
    for rest in (slice(rotary_offset), slice(rotary_offset + 24, None)):
        assert torch.equal(inside.tensor[..., rest], x[..., rest])
    inside.assert_untouched_around()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_many_tokens_take_wide_tiles(dtype):
    q, k = randn(1, 521, 2, 64, dtype=dtype), randn(1, 521, 1, 64, dtype=dtype)
    check([q, k], rope_rotation(64))


@pytest.mark.parametrize(
    "shape", ((0, 4, 2, 16), (2, 0, 2, 16), (2, 4, 0, 16)), ids=("batch", "seqlen", "heads")
)
def test_nothing_to_do_launches_nothing(shape, monkeypatch):
    monkeypatch.setattr(Launch, "_launch", None)
    x, inv_freq = randn(*shape), randn(8)
    _, _, angle_grad = torch.ops.extrope.rope_bwd_triton(x, None, x, None, inv_freq)
    assert torch.equal(angle_grad, torch.zeros(*shape[:2], 1, 8, device=DEVICE))


def test_offset_past_32_bits():
    rotation = rope_rotation(16, offset=2**33 + 1)
    check([randn(1, 3, 1, 16)], replace(rotation, inv_freq=rotation.inv_freq * 1e-4))


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
    first = 3 if per_head else 0
    by = {"interleaved": interleaved, "rotary_offset": first}
    rotation = rope_rotation(12, conjugate=True, offset=500, **by)
    if per_head:
        inv_freq = rotation.inv_freq * torch.rand(1, 3, 1, device=DEVICE)
        rotation = replace(rotation, inv_freq=inv_freq)
    dx, angle_grad = backward(saved, grads, rotation)

    wide = accumulator(dtype)
    at = (PairDims(12, interleaved, first), per_head)
    widened = reference.rotate([g.to(wide) for g in grads], rotation)
    same_dtype = sum(cross(x, d, *at) for x, d in zip(saved, widened, strict=True))
    want_dx = exact(grads, rotation)
    dims = first + np.arange(12)
    first, second = (dims[0::2], dims[1::2]) if interleaved else (dims[:6], dims[6:])
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


@pytest.mark.parametrize("ends", ((5, 9, 30, -4), (-3, -2, -1, 0), (7, 7, 7, 7), (90, 2, 60, 1)))
def test_no_cu_seqlens_reads_out_of_bounds(ends):
    rows = torch.full((7, 1, 8), torch.nan, device=DEVICE)
    rows[2:5] = 0.1
    rotation = rope_rotation(16, cu_seqlens=cumulative(*ends))
    x = randn(1, 11, 1, 16)
    out = guarded_like(x)
    rotate([x], [out.tensor], None, None, replace(rotation, inv_freq=rows[2:5]))
    assert out.tensor.isfinite().all()
    out.assert_untouched_around()


@LAYOUTS
@pytest.mark.parametrize("gap", (1, 2, 8), ids=lambda gap: f"gap {gap}")
def test_transposed_memory_and_unaligned_rows(gap, interleaved):
    q = randn(2, 3, 4, 16 + gap, dtype=torch.float16).transpose(1, 2)[..., gap:]
    k = randn(2, 1, 4, 16, dtype=torch.float16).transpose(1, 2)
    check([q, k], rope_rotation(16, interleaved=interleaved, offset=50), gap)


@pytest.mark.parametrize("axis", (0, 1, 2), ids=("batch", "seqlen", "heads"))
def test_strides_past_32_bits(axis, monkeypatch):
    # Only the pages that are touched get memory, so none may be filled. An odd stride of just over
    # 2**30 elements fits in 32 bits, its multiples do not.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 1
    shape = [1, 1, 1, 8]
    shape[axis] = 3
    strides = [8, 8, 8, 1]
    strides[axis] = stride
    if INTERPRETED:
        copy = torch.UntypedStorage.copy_

        def copy_unless_same(self, source, *args):
            return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args)

        # The interpreter copies every storage back, here onto itself.
        monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_unless_same)
    x = torch.empty(2 * stride + 8, dtype=torch.float16, device=DEVICE).as_strided(shape, strides)
    dense = randn(*shape, dtype=torch.float16)
    x.copy_(dense)
    rotation = rope_rotation(8, offset=11)
    want, same_dtype = exact([dense], rotation)[0], reference.rotate([dense], rotation)[0]
    out = torch.empty_like(dense)
    rotate([x], [out], None, None, rotation)
    assert_rotated("from far apart", out, same_dtype, want)
    rotate([x], [x], None, None, rotation)
    assert_rotated("in place", x, same_dtype, want)
