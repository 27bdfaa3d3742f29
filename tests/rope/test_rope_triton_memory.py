"""What the Triton rotation reads and writes: packed sequences and strides of all kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from rope_oracle import (
    DEVICE,
    INTERPRETED,
    assert_rotated,
    check,
    exact,
    guarded_like,
    randn,
    rope_rotation,
)

from extrope_kernels.ops.rope import reference
from extrope_kernels.ops.rope.triton import rotate

LAYOUTS = pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))


def cumulative(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("kind", ("index", "positions", "offsets"))
def test_packed_sequences_some_empty(kind):
    cu_seqlens = cumulative(0, 0, 3, 3, 7, 11, 11)
    positions = {
        "index": None,
        "positions": torch.randint(0, 100_000, (1, 11), device=DEVICE),
        "offsets": torch.randint(0, 100_000, (6,), device=DEVICE),
    }[kind]
    rotation = rope_rotation(
        16,
        cu_seqlens=cu_seqlens,
        positions=positions,
        positions_are_offsets=kind == "offsets",
        offset=2,
    )
    per_sequence = rotation.inv_freq * torch.rand(6, 1, 1, device=DEVICE)
    check([randn(1, 11, 2, 16), randn(1, 11, 1, 16)], replace(rotation, inv_freq=per_sequence))


def test_one_packed_sequence():
    check([randn(1, 5, 1, 16)], rope_rotation(16, cu_seqlens=cumulative(0, 5)))


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


def test_views_of_a_fused_projection_in_place():
    fused = randn(2, 3, 5, 16)
    before = fused.clone()
    q, k = fused[:, :, :3], fused[:, :, 3:4]
    rotation = rope_rotation(16, offset=50)
    rotate([q, k], [q, k], None, None, rotation)
    inputs = [before[:, :, :3], before[:, :, 3:4]]
    want = exact(inputs, rotation)
    for name, got, ref, ideal in zip(
        "qk", (q, k), reference.rotate(inputs, rotation), want, strict=True
    ):
        assert_rotated(name, got, ref, ideal)
    assert torch.equal(fused[:, :, 4], before[:, :, 4])


@pytest.mark.parametrize("shape", ((1, 3, 2, 16), (2, 1, 2, 16), (2, 3, 1, 16)))
def test_expanded_inputs(shape):
    check([randn(*shape).expand(2, 3, 2, 16)], rope_rotation(16, offset=50))


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
