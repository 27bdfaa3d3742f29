"""What the Triton permutation reads and writes, whatever it is given."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from extrope_kernels import head_permutations
from extrope_kernels.ops.permute.power import Power
from extrope_kernels.ops.permute.reference import source_dims


def power(permutations: torch.Tensor, **fields) -> Power:
    given = {"positions": None, "positions_are_offsets": False, "offset": 0}
    given |= {"cu_seqlens": None, "inverse": False}
    return Power(permutations, **(given | fields))


def check(inputs: list[torch.Tensor], power: Power, gap: int = 8) -> None:
    from rope_oracle import BITS, guarded_like

    from extrope_kernels.ops.permute.triton import permute

    outputs = [guarded_like(x, gap) for x in inputs]
    permute(inputs, [out.tensor for out in outputs], power)
    dims = source_dims(power, inputs[0].shape[1])
    for x, out in zip(inputs, outputs, strict=True):
        of_heads = dims.repeat_interleave(x.shape[2] // dims.shape[2], 2).expand(x.shape)
        bits = BITS[x.itemsize]
        assert torch.equal(out.tensor.view(bits), x.gather(-1, of_heads).view(bits))
        out.assert_untouched_around()


@pytest.mark.parametrize("gap", (1, 2, 8), ids=lambda gap: f"gap {gap}")
def test_transposed_memory_and_unaligned_rows(gap):
    from rope_oracle import DEVICE, randn

    q = randn(2, 4, 5, 24 + gap, dtype=torch.float16).transpose(1, 2)[..., gap:]
    k = randn(2, 2, 5, 24, dtype=torch.float16).transpose(1, 2)
    check([q, k], power(head_permutations(2, 24).to(DEVICE), offset=10**6), gap)


@pytest.mark.parametrize("ends", ((5, 9, 30, -4), (-3, -2, -1, 0), (90, 2, 60, 1)))
def test_no_cu_seqlens_reads_out_of_bounds(ends):
    from rope_oracle import DEVICE, guarded_like, randn

    from extrope_kernels.ops.permute.triton import permute

    x = randn(1, 11, 1, 16)
    out = guarded_like(x)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    permute([x], [out.tensor], power(head_permutations(1, 16).to(DEVICE), cu_seqlens=cu_seqlens))
    assert torch.isin(out.tensor, x).all()
    out.assert_untouched_around()


@pytest.mark.parametrize("given", ("zeros", "tails", "outside"))
def test_no_permutations_lead_out_of_bounds(given):
    from rope_oracle import DEVICE, guarded_like, randn

    from extrope_kernels.ops.permute.triton import permute

    rows = {
        "zeros": torch.zeros(1, 24, dtype=torch.int64),
        "tails": torch.arange(24).sub(1).clamp(0)[None].contiguous(),
        "outside": torch.randint(-(2**62), 2**62, (1, 24)),
    }[given].to(DEVICE)
    x = randn(1, 5, 1, 24)
    for offset in (3, 2**62):
        out = guarded_like(x)
        permute([x], [out.tensor], power(rows, offset=offset))
        for row, permuted in zip(x[0], out.tensor[0], strict=True):
            assert torch.isin(permuted, row).all()
        out.assert_untouched_around()
