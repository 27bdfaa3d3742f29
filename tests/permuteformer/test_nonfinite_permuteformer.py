"""NaN and infinite inputs of linear attention: exactly what the formula makes of them is spoilt.

The formula is written row by row, on the tokens that a row sees: masked products, as in the
reference, would carry NaN to all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from extrope_kernels import head_permutations, permute_qk, permuteformer_attention
from extrope_kernels.testing import available_backends, device

HEADS_Q, HEADS_K, DIM = 4, 2, 24
COLUMN = 5
VALUES = (math.nan, math.inf, -math.inf)
NAMES = ("q", "k", "v", "dout")
# Tokens, and the one that is poisoned: amid a chunk of 48 (of the interpreter: 16) and amid a block
# of its rows.
SIZES = {"cpu": (75, 55), "triton": (75, 55) if device() == "cuda" else (37, 20)}
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    (name, dtype)
    for name in available_backends()
    for dtype in DTYPES
    if name == "cpu" or (name == "triton" and dtype in DTYPES[: 1 + (device() == "cuda")])
]
MODES = [{"causal": a, "normalize": b} for a, b in product((True, False), repeat=2)]
CHUNK = 64  # of Triton, at most


def make(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, _ = SIZES[backend]
    heads = {"q": HEADS_Q, "k": HEADS_K, "v": HEADS_K, "dout": HEADS_Q}
    return {
        name: torch.randn(1, tokens, n, DIM, generator=generator).to(device(), dtype)
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), CASES, ids=str)
def test_what_is_spoilt(implementation, dtype, mode):
    tensors, (_, row) = make(implementation, dtype), SIZES[implementation]
    permutations = head_permutations(HEADS_K, DIM).to(device())
    # Products there see a whole chunk: scores of zero meet NaN, and masks of zero infinite scores.
    by_chunk = implementation == "triton"

    def run(*qkv, **mode):
        arguments = {"permutations": permutations, "backend": implementation}
        return permuteformer_attention(*qkv, **arguments, **mode)

    for name, value in product(NAMES, (math.nan,) if by_chunk else VALUES):
        given = {key: x.clone() for key, x in tensors.items()}
        given[name][0, row, 1, COLUMN] = value
        exact = results(row_by_row, *(x.double() for x in given.values()), **mode)
        for key, found in results(run, *given.values(), **mode).items():
            spoilt, wanted = ~found.isfinite(), ~exact[key].isfinite()
            assert spoilt[wanted].all(), f"{value} in {name}: {key} hides it"
            more = (spoilt & ~wanted).nonzero()[:, 1]
            if by_chunk and mode["causal"]:
                more = more[(more - row).abs() >= CHUNK]
            assert not len(more), f"{value} in {name}: {key} has it in rows {more.unique()}"
