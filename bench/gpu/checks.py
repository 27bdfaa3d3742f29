"""Checks for smoke.py: every operation on every backend, within the tests' own error budget.

Oracles are those of tests/support: the closed form in float64, and plain PyTorch in the tensors'
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import attention_oracle as oracle
import decode_oracle
import operations
import torch
from score_examples import EXAMPLES
from torch import Tensor

from extrope_kernels.testing import assert_within_budget

DTYPES = (torch.bfloat16, torch.float32)
SIZES = {"seqlen_q": 200, "heads_q": 6, "heads_k": 2, "head_dim": 64}
LENGTHS = (700, 150)  # of the cached sequences
SCORES = ("rerope", "dual_chunk")  # two and three regions; the suite has the others
CACHED = ("plain", "rerope", "leaky_rerope")
# Attention's reference multiplies in float32, while kernels round to 16 bits: it is no measure.
BY_REFERENCE = (
    *("rope", "rope by cos and sin", "norm and rope", "norm, rope and append"),
    "merge",
)
Check = Callable[[], None]


def checks() -> Iterator[tuple[str, Check]]:
    """Return checks by name; a check raises if results are wrong or missing."""
    for dtype in DTYPES:
        for name, operation in operations.OPERATIONS.items():
            if name.removesuffix(", backward") in BY_REFERENCE:
                for backend in others(operation.backends):
                    yield named(name, backend, dtype), partial(same, name, backend, dtype)
        for score in SCORES:
            for backend in others(operations.ATTENTION):
                yield named(score, backend, dtype), partial(attention, score, backend, dtype)
        for score in CACHED:
            for backend in others(operations.ATTENTION):
                name = f"{score} with a cache"
                yield named(name, backend, dtype), partial(decode, score, backend, dtype)
        for backend in others(operations.ATTENTION):
            yield named("append", backend, dtype), partial(append, backend, dtype)


def named(name: str, backend: str, dtype: torch.dtype) -> str:
    return f"{name}, {backend}, {str(dtype)[6:]}"


def others(backends: tuple[str, ...]) -> list[str]:
    """Return the backends except the reference; interpreted, Triton takes minutes."""
    here = {backend for _, backend in operations.everywhere()}
    return [name for name in backends if name in here and name != "reference"]


def same(name: str, backend: str, dtype: torch.dtype) -> None:
    """Compare with the reference in the same dtype, and in float64."""
    operation = operations.OPERATIONS[name]
    inputs = operation.inputs(dtype)
    exact = operation.run("reference", **{key: x.double() for key, x in inputs.items()})
    low = operation.run("reference", **copies(inputs))
    found = operation.run(backend, **copies(inputs))
    noises = of_norm(exact, inputs["q"]) if "q_weight" in inputs else [0.0] * len(exact)
    compare(found, low, exact, noises)


def compare(
    found: list[Tensor], low: list[Tensor], exact: list[Tensor], noises: list[float]
) -> None:
    for index, (*results, noise) in enumerate(zip(found, low, exact, noises, strict=True)):
        assert_within_budget(f"result {index}", *results, noise=noise)


def of_norm(exact: list[Tensor], q: Tensor) -> list[float]:
    """Return the roundings that a norm adds to the rotation's.

    They are its mean, products and differences; in the gradient of a weight (1-D) also each
    addition of a running sum, at most as large as the whole.
    """
    terms = [q.numel() / x.numel() if x.dim() == 1 else 0 for x in exact]
    half = torch.finfo(torch.float32).eps / 2
    return [half * (10 + n**0.5) * x.abs().max().item() for n, x in zip(terms, exact)]


def copies(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the arguments: an operation may write into them."""
    return {name: x.clone() for name, x in inputs.items()}


def attention(score: str, backend: str, dtype: torch.dtype, **sizes: int) -> None:
    """Compare output, log-sum-exp and gradients."""
    tensors, example = oracle.make_qkv(**{**SIZES, **sizes}, dtype=dtype), EXAMPLES[score]
    with torch.no_grad():
        oracle.check(backend, example, tensors)
    oracle.check_gradients(backend, example, tensors, with_lse=False)


def decode(score: str, backend: str, dtype: torch.dtype) -> None:
    """Attend from one token, and from a few, over a paged cache."""
    for tokens in (1, 5):
        check_decode(score, backend, dtype, tokens, 64)


def check_decode(score, backend, dtype, tokens: int, head_dim: int, **sizes: int) -> None:
    dims = {"head_dim": head_dim, "rotary_dim": head_dim, "page_size": 16, **sizes}
    own = decode_oracle.SCORES[score]
    decode_oracle.check(decode_oracle.Case(LENGTHS, tokens, dtype=dtype, **dims, **own), backend)


def append(backend: str, dtype: torch.dtype) -> None:
    """Return the written slots of the cache, and no others."""
    operation = operations.OPERATIONS["cache, appended to"]
    inputs = operation.inputs(dtype)
    exact = operation.run("reference", **{key: x.double() for key, x in inputs.items()})
    low, found = (operation.run(name, **copies(inputs)) for name in ("reference", backend))
    compare(found[:2], low[:2], exact[:2], [0.0, 0.0])
