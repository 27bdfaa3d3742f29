"""What the generated tests share: strategies for tensors, frequencies and layouts, and the count.

A `generated` test runs a few fixed examples, so that CI is short and the same every time.
`pytest --hypothesis-profile=thorough` runs EXTROPE_EXAMPLES (default 500) random ones of each test,
on every backend, and says at the end how many there were.
"""

from __future__ import annotations

import functools
from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.method_examples import example
from torch import Tensor

from extrope_kernels.methods import METHODS, RopeFreqs
from extrope_kernels.testing import device

CASES: Counter[str] = Counter()
INTERPRETED = device() == "cpu"
LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float64)
LAYOUTS = ("dense", "heads first", "gaps", "unaligned", "sequence first", "expanded")


def thorough() -> bool:
    return settings().max_examples >= 200


def generated(examples: int = 20, **strategies):
    """`hypothesis.given`, and a count of the cases; examples: how many in CI."""

    def decorate(test):
        @functools.wraps(test)
        def counted(**drawn):
            CASES[test.__name__] += 1
            test(**drawn)

        many = settings().max_examples if thorough() else examples
        checks = list(HealthCheck)
        return settings(suppress_health_check=checks, max_examples=many)(
            given(**strategies)(counted)
        )

    return decorate


def backends(names: list[str]) -> st.SearchStrategy[str]:
    """Any of these implementations; interpreted Triton in a thorough run alone, and rarely."""
    quick = [name for name in names if name != "triton" or not INTERPRETED]
    slow = [name for name in names if name not in quick]
    if not slow:
        return st.sampled_from(quick)
    often = st.sampled_from(quick)
    return st.integers(0, 19).flatmap(
        lambda n: st.sampled_from(slow) if n == 0 and thorough() else often
    )


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device(), dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (one head's for all when "expanded") in another place in memory.

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim).
    """
    if layout == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sequence first" and x.dim() == 4:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "unaligned":
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)
    if layout == "expanded" and x.shape[-2] > 0:
        return x[..., :1, :].expand_as(x)
    if layout == "gaps":
        margin = (2, 1, 3)  # of seqlen, heads and head_dim
        *batch, seqlen, heads, dim = x.shape
        around = x.new_full((*batch, seqlen + 4, heads + 2, dim + 6), torch.nan)
        view = around[..., margin[0] : margin[0] + seqlen, margin[1] : margin[1] + heads, :]
        view = view[..., margin[2] : margin[2] + dim]
        return view.copy_(x)
    return x.contiguous()


@st.composite
def lengths(draw, longest: int) -> list[int]:
    """The lengths of packed sequences, some of them empty."""
    return draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device(), dtype)


@st.composite
def frequencies(draw, head_dim: int, names: tuple[str, ...] = tuple(METHODS)) -> RopeFreqs:
    """Frequencies of any method, for all dims of a head or for some."""
    pairs = draw(st.integers(1, head_dim // 2))
    of_one = [n for n in names if "ntk" not in n and n != "axial"]  # the others take two pairs
    name = draw(st.sampled_from(names if pairs > 1 else of_one))
    drawn = {
        "original_max_position_embeddings": draw(st.sampled_from((64, 256, 4096))),
        "factor": draw(st.sampled_from((1.0, 1.5, 4.0, 32.0))),
        "seq_len": draw(st.integers(1, 9000)),
        "power": draw(st.sampled_from((0.0, 0.5, 2.0))),
        "partial_rotary_factor": draw(st.sampled_from((0.25, 1.0))),
    }
    parameters = {key: drawn.get(key, value) for key, value in example(name, 2 * pairs).items()}
    return METHODS[name](2 * pairs, **parameters).to(device())
