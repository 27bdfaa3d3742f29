"""torch's default dtype and device are for tensors of the user's own: no result depends on them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from extrope_kernels import (
    head_permutations,
    methods,
    permute,
    permuteformer_attention,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
)
from extrope_kernels.ops.cache.api import BACKENDS
from extrope_kernels.scores import query_scale, rerope
from extrope_kernels.testing import available_backends, device

Q, K, V = (torch.randn(2, 6, heads, 8, device=device()) for heads in (4, 2, 2))
FREQS = methods.rope(8).to(device())
PERMUTATIONS = head_permutations(2, 8).to(device())
POSITIONS = torch.arange(300, device=device())
TABLE = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=device())
PAGES = torch.randn(2, 3, 4, 2, 8, device=device())


def paged(backend: str | None) -> Tensor:
    cache = {"cache_seqlens": 6, "block_table": TABLE, "backend": backend}
    return rope_attention_with_kvcache(Q, *PAGES, FREQS, rerope(3), log_n=2.0, **cache)


CALLS = {
    "log_n": lambda backend: query_scale.log_n(POSITIONS, 7),
    "ministral3": lambda backend: query_scale.ministral3(POSITIONS, 7),
    "attention": lambda backend: rope_attention(
        Q, K, V, FREQS, rerope(3), log_n=2.0, backend=backend
    ),
    "a paged cache": paged,
    "permutations": lambda backend: head_permutations(2, 8),
    "permute": lambda backend: permute(Q, PERMUTATIONS, backend=backend),
    "PermuteFormer": lambda backend: permuteformer_attention(
        Q, K, V, permutations=PERMUTATIONS, backend=backend
    ),
}


def appended(backend: str | None) -> Tensor:
    """The cache after keys that do not rotate."""
    caches = [torch.zeros_like(PAGES[0, :2]) for _ in "kv"]
    new = (x[:, :3] for x in (Q, K, V))
    rope_append_kvcache(*new, *caches, FREQS, score=rerope(3), cache_seqlens=1, backend=backend)
    return torch.stack(caches)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("named", [x for x in available_backends() if x in BACKENDS])
def test_an_append_to_a_cache_of_raw_keys(named):
    with default_dtype(torch.bfloat16):  # first: launches are kept
        found = appended(named)
    assert torch.equal(found, appended(named)) and found[:, :, 1:].all()


@pytest.mark.parametrize("named", [None, "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_the_same(name, named):
    expected = CALLS[name](named)
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            found = CALLS[name](named)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    with torch.device("meta"):
        found = CALLS[name](named)
    assert torch.equal(found, expected)
