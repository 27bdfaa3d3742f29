"""Under torch.autocast operations give what they give without: it is for PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from operations import OPERATIONS, everywhere

CASES = [case for case in everywhere() if "backward" not in case[0]]
WITHOUT_GRADIENT = ("cache", "cache, appended to", "norm, rope and append")


@pytest.mark.parametrize(("name", "runs"), CASES)
def test_same_bits_under_autocast(name, runs):
    tensors = OPERATIONS[name].inputs(torch.float32)
    for x in tensors.values():
        x.requires_grad_(name not in WITHOUT_GRADIENT)
    expected = OPERATIONS[name].run(runs, **tensors)
    with torch.autocast(next(iter(tensors.values())).device.type, torch.bfloat16):
        found = OPERATIONS[name].run(runs, **tensors)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
