"""NaN and infinite inputs on a CPU: exactly what the formula makes of them is spoilt.

The formula is written row by row, on the tokens that a row sees: masked products, as in the
reference, would carry NaN to all rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from extrope_kernels import head_permutations, permute_qk, permuteformer_attention
from extrope_kernels.testing import device

HEADS_Q, HEADS_K, DIM = 4, 2, 24
COLUMN = 5
VALUES = (math.nan, -math.inf)
NAMES = ("q", "k", "v", "dout")
TOKENS, ROW = 75, 55  # and the one that is poisoned: amid a chunk of 48, and a block of its rows
MODES = [{"causal": a, "normalize": b} for a, b in product((True, False), repeat=2)]
pytestmark = pytest.mark.skipif(device() != "cpu", reason="a GPU's products see a whole chunk")


def make(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {"q": HEADS_Q, "k": HEADS_K, "v": HEADS_K, "dout": HEADS_Q}
    return {
        name: torch.randn(1, TOKENS, n, DIM, generator=generator).to(dtype)
        for name, n in heads.items()
    }


def row_by_row(q: Tensor, k: Tensor, v: Tensor, causal: bool, normalize: bool) -> Tensor:
    """The paper's formula."""
    q, k = permute_qk(q, k, head_permutations(HEADS_K, DIM).to(q.device), backend="reference")
    k, v = (x.repeat_interleave(HEADS_Q // HEADS_K, 2) for x in (k, v))
    q, k = torch.relu(q) + 1e-3, torch.relu(k) + 1e-3
    rates = torch.sigmoid(2 + 3 * torch.arange(HEADS_K, device=q.device) / HEADS_K)
    rates = rates.to(q.dtype).repeat_interleave(HEADS_Q // HEADS_K)
    rows = []
    for i in range(q.shape[1]):
        seen = slice(0, i + 1) if causal else slice(None)
        scores = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, seen])
        if causal:
            scores = scores * rates[:, None] ** torch.arange(i, -1, -1, device=q.device)
        row = torch.einsum("bhj,bjhf->bhf", scores, v[:, seen])
        rows.append(row / scores.sum(-1, keepdim=True) if normalize else row)
    return torch.stack(rows, 1)


def results(
    run: Callable, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **mode
) -> dict[str, Tensor]:
    """out and the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = run(*leaves, **mode)
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads)))


@pytest.mark.parametrize(
    "dtype, mode", [*((torch.float32, mode) for mode in MODES), (torch.bfloat16, MODES[0])], ids=str
)
def test_what_is_spoilt(dtype, mode):
    tensors, permutations = make(dtype), head_permutations(HEADS_K, DIM)
    run = functools.partial(permuteformer_attention, permutations=permutations)
    clean = results(run, *tensors.values(), **mode)
    for name, value in product(NAMES, VALUES):
        given = {key: x.clone() for key, x in tensors.items()}
        given[name][0, ROW, 1, COLUMN] = value
        exact = results(row_by_row, *(x.double() for x in given.values()), **mode)
        for key, found in results(run, *given.values(), **mode).items():
            spoilt, wanted = ~found.isfinite(), ~exact[key].isfinite()
            assert spoilt[wanted].all(), f"{value} in {name}: {key} hides it"
            more = (spoilt & ~wanted).nonzero()[:, 1]
            assert not len(more), f"{value} in {name}: {key} has it in rows {more.unique()}"
            if math.isnan(value):  # what does not see it is as without it, added in another order
                if key == f"d{name}":
                    spoilt[0, ROW, 1, COLUMN] = True  # by relu, whose derivative there is another
                rounding = 8 * torch.finfo(dtype).eps * clean[key].abs().max().item()
                near = (found - clean[key])[~spoilt].abs() <= rounding
                assert near.all(), f"{name}: {key} changes beside it"


@pytest.mark.parametrize("which", range(3))
def test_nan_of_either_sign_spoils_no_earlier_row(which):
    """relu must not swallow it."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 130, 1, 64, generator=generator).bfloat16() for _ in "qkv"]
    qkv[which].view(torch.int16)[0, 70, 0, 3] = -1
    out = permuteformer_attention(*qkv, permutations=head_permutations(1, 64))
    assert out[0, :70].isfinite().all()
    spoilt = out[0, 70:, 0].isnan()
    assert spoilt[0].all() if which == 0 else spoilt[:, 3].all()
