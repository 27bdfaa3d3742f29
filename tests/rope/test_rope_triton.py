"""The Triton rotation, on a GPU or interpreted: types, shapes, positions, frequencies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from rope_oracle import DEVICE, assert_rotated, check, exact, guarded_like, randn, rope_rotation

from extrope_kernels.ops.rope import reference
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
