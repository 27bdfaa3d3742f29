"""Methods that take slow frequencies away."""

import math

import pytest
import torch
from test_methods import same_bits

from extrope_kernels import methods


@pytest.mark.parametrize(("dim", "clip"), [(128, 20), (16, 20), (64, 5), (64, 1), (8, 4)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_cope_fades_with_the_bits_of_the_authors_formula(dim, clip, base):
    table = methods.rope(dim, base=base).inv_freq
    faded = min(clip, dim // 2)
    angles = torch.linspace(0.0, torch.pi, steps=faded, dtype=torch.float32)
    fade = 0.5 * (1.0 + torch.cos(angles))
    expected = torch.cat((table[:-faded], table[-faded:] * fade))
    inv_freq = methods.cope(dim, base=base, clip=clip).inv_freq
    assert same_bits(inv_freq, expected)
    assert inv_freq[-faded] == table[-faded] and (faded == 1 or inv_freq[-1] == 0)


@pytest.mark.parametrize(("truncate_pos", "counts"), [(2048, (41, 14, 9)), (4096, (46, 14, 4))])
def test_giraffe_truncation_counts(truncate_pos, counts):
    inv_freq = methods.giraffe_truncation(128, truncate_pos=truncate_pos).inv_freq
    cutoff = 2 * math.pi / truncate_pos
    slow, zero = (inv_freq == torch.tensor(cutoff / 16)).sum().item(), (inv_freq == 0).sum().item()
    assert (64 - slow - zero, slow, zero) == counts
