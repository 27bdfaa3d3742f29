"""Under torch.autocast operations give what they give without: it is for PyTorch's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.operations import LARGE, OPERATIONS, everywhere

from extrope_kernels import methods, rope_attention
from extrope_kernels.testing import device


@pytest.mark.parametrize(("name", "runs"), everywhere())
def test_same_bits_under_autocast(name, runs):
    operation, found = replace(OPERATIONS[name], sizes=LARGE), []
    for on in (False, True):
        tensors = operation.tensors(0, torch.float32)
        for key in operation.shapes:
            tensors[key].requires_grad_(operation.gradients)
        with torch.autocast(device(), torch.bfloat16, enabled=on):
            found.append(operation.run(runs, **tensors))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def attended(q: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return rope_attention(q, q, q, methods.rope(16).to(device()), sinks=sinks)


def merged(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    return torch.ops.extrope.merge_fwd(list(outs), list(lses))[0]


@pytest.mark.parametrize(
    ("run", "shapes"),
    [(attended, ((2, 9, 2, 16), (2,))), (merged, ((2, 2, 9, 2, 16), (2, 2, 2, 9)))],
)
def test_same_bits_of_a_backward_under_autocast(run, shapes):
    """Graphs of torch.compile run it under the autocast of their forward."""
    inputs = [torch.randn(shape, device=device(), requires_grad=True) for shape in shapes]
    found = []
    for on in (False, True):
        with torch.autocast(device(), torch.bfloat16, enabled=on):
            out = run(*inputs)
            found.append(torch.autograd.grad(out, inputs, out.detach().cos()))
    assert all(map(torch.equal, *found))
