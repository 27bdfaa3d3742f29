"""NaN and infinite inputs: what depends on them shows it, as in PyTorch, and no more does.

Of linear attention see test_nonfinite_permuteformer.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.operations import LARGE, OPERATIONS, SCORES, everywhere
from torch import Tensor

from extrope_kernels import (
    RopeFreqs,
    methods,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.testing import attention_backends, device

ROW, HEAD, LANE = 100, 1, 5  # of the second batch entry
VALUES = (math.nan, math.inf, -math.inf)
ATTENTION = (*SCORES, "leaky_rerope, decode")
CASES = [(n, i) for n, i in everywhere() if n in ATTENTION and i != "reference"]
GRADIENTS = [(n, i) for n, i in everywhere() if n == "rerope" and i != "reference"]


def poisoned(tensors: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    changed = {key: x.clone() for key, x in tensors.items()}
    x = changed[name]
    x[1, min(ROW, x.shape[1] - 1), HEAD, LANE] = value
    return changed


def worst(found: Tensor, expected: Tensor) -> float:
    both = found.isfinite() & expected.isfinite()
    return (found.double() - expected.double()).abs()[both].max().item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_attention(name, implementation, dtype):
    """Exactly the rows and dims that PyTorch's formula spoils are spoilt.

    Values are the exception, and PyTorch's kernels make it too: times a weight of zero they spoil
    the rows that do not see them where those share a tile with rows that do, or do not.
    """
    operation = replace(OPERATIONS[name], sizes=LARGE)
    tensors = operation.tensors(0, dtype)
    query, key, values = operation.shapes
    clean = [operation.run(i, **tensors)[0] for i in (implementation, "reference")]
    allowed = 2 * worst(*clean)
    seen = ~operation.run("reference", **poisoned(tensors, key, math.nan))[1].isfinite()
    for which in (query, key, values):
        for value in VALUES:
            given = poisoned(tensors, which, value)
            out, lse = operation.run(implementation, **given)
            expected, expected_lse = operation.run("reference", **given)
            assert torch.equal(lse.isfinite(), expected_lse.isfinite())
            if which == values:
                spoilt = ~out[..., LANE].isfinite().transpose(1, 2)
                assert spoilt[seen].all() and lse.isfinite().all()
                rest = torch.arange(out.shape[-1], device=out.device) != LANE
                assert out[..., rest].isfinite().all()
            else:
                assert torch.equal(out.isfinite(), expected.isfinite())
            assert worst(out, expected) <= allowed


@pytest.mark.parametrize(("name", "implementation"), GRADIENTS)
def test_gradients(name, implementation):
    """A query that is NaN spoils its own gradient and those of all keys and values that it sees."""
    operation = replace(OPERATIONS[name], sizes=LARGE)
    given = poisoned(operation.tensors(0, torch.float32), "q", math.nan)
    *_, dq, dk, dv = operation(implementation, **given)
    assert dq[1, ROW, HEAD].isnan().all()
    assert dk[1, : ROW + 1, 0].isnan().all() and dv[1, : ROW + 1, 0].isnan().all()
    for grad, spoilt in (
        (dq, (1, ROW, HEAD)),
        (dk, (1, slice(None), 0)),
        (dv, (1, slice(None), 0)),
    ):
        grad[spoilt] = 0.0
        assert grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, for NaN
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("implementation", attention_backends())
def test_frequencies(implementation, value):
    """A frequency that is no number spoils every row that sees a key, forward and backward."""
    inv_freq = methods.rope(16).inv_freq
    inv_freq[3] = value
    freqs = RopeFreqs(inv_freq.to(device()))
    tensors = [torch.randn(1, 20, 2, 16, device=device()) for _ in range(3)]
    for score in (None, scores.rerope(4), scores.dpe(4, [2] * 8)):
        options = {"return_lse": True, "backend": implementation}
        for rotated in (None, "k"):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out, lse = rope_attention(*leaves, freqs, score, rotated=rotated, **options)
            grads = torch.autograd.grad(out.sum(), leaves)
            assert all(x.isnan().all() for x in (out, lse, *grads))
        q, *caches = tensors
        options["cache_seqlens"] = 20
        found = rope_attention_with_kvcache(q[:, :3], *caches, freqs, score, **options)
        assert all(x.isnan().all() for x in found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("implementation", OPERATIONS["permute"].backends)
@pytest.mark.parametrize("name", ("q", "k"))
def test_permute(name, implementation, dtype):
    """One dim goes in and one comes out, in the same row of the same head; gradients likewise."""
    operation = replace(OPERATIONS["permute"], sizes=replace(LARGE, seqlen=ROW + 1))
    tensors = operation.tensors(0, dtype)
    for value in VALUES:
        given = poisoned(tensors, name, value)
        leaves = {key: tensors[key].clone().requires_grad_() for key in operation.shapes}
        outs = operation.run(implementation, **(tensors | leaves))
        grads = torch.autograd.grad(outs, list(leaves.values()), [given[key] for key in leaves])
        for found in (operation.run(implementation, **given), grads):
            for key, x in zip(leaves, found):
                where = (~x.isfinite()).nonzero()[:, :3].tolist()
                assert where == ([[1, ROW, HEAD]] if key == name else [])
