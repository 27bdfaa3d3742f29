"""New tokens, a cache, and what `rope_append_kvcache` must make of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope_qk, methods, rope_append_kvcache
from extrope_kernels.testing import assert_within_budget, device

HEADS_Q, HEADS_K = 4, 2
FILLER = -7.0  # of slots that nothing may be written to


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device())


@dataclass
class Step:
    """New tokens of two sequences, a cache, and what the call is given beside them."""

    head_dim: int = 32
    head_dim_v: int = 32
    rotary_dim: int = 32
    dtype: torch.dtype = torch.float32
    blocks: tuple[int, int] = (2, 23)  # of the cache: how many, of how many slots
    tokens: tuple[int, ...] = (2, 5)
    call: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device(), self.dtype)

        # Views of one packed projection.
        sizes = [HEADS_Q * self.head_dim, HEADS_K * self.head_dim, HEADS_K * self.head_dim_v]
        packed = randn(*self.tokens, sum(sizes)).split(sizes, -1)
        shapes = [(HEADS_Q, -1), (HEADS_K, -1), (HEADS_K, -1)]
        self.q, self.k, self.v = (x.unflatten(-1, n) for x, n in zip(packed, shapes))
        self.freqs = RopeFreqs(methods.rope(self.rotary_dim).inv_freq.to(device()), 1.1)

    def caches(self, dtype: torch.dtype) -> list[Tensor]:
        shapes = [(*self.blocks, HEADS_K, n) for n in (self.head_dim, self.head_dim_v)]
        return [torch.full(shape, FILLER, dtype=dtype, device=device()) for shape in shapes]

    def run(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """q, k_cache and v_cache."""
        dtype = dtype or self.dtype
        caches = self.caches(dtype)
        qkv = [x if dtype == self.dtype else x.to(dtype) for x in (self.q, self.k, self.v)]
        call = {"freqs": self.freqs, **self.call}
        return [rope_append_kvcache(*qkv, *caches, backend=backend, **call), *caches]

    def expected(self, slots: list[tuple[int, int, int, int]], positions: Tensor) -> list[Tensor]:
        """In float64. slots: (batch, token, block, place) of all that are written."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        if k.dim() == 3:
            q, k, v = q[None], k[None], v[None]
        call = {"positions": positions, "backend": "reference"}
        names = ("interleaved", "rotary_offset")
        call |= {name: self.call[name] for name in names if name in self.call}
        rotated_q, rotated_k = apply_rope_qk(q, k, self.freqs, **call)
        k_cache, v_cache = self.caches(torch.float64)
        for batch, token, block, place in slots:
            k_cache[block, place] = rotated_k[batch, token]
            v_cache[block, place] = v[batch, token]
        return [rotated_q.view(self.q.shape), k_cache, v_cache]

    def check(self, backend: str, expected: list[Tensor]) -> None:
        got, same = self.run(backend), self.run("reference")
        # Triton's interpreter truncates when it casts to bfloat16; a GPU rounds.
        truncates = backend == "triton" and self.dtype == torch.bfloat16 and device() == "cpu"
        for name, *values in zip(("q", "k_cache"), got, same, expected):
            assert_within_budget(name, *values, float(truncates))
            # Its error is all that others may have: that has to be a rounding, too.
            mine, exact = values[1:]
            assert_within_budget(f"reference's {name}", mine, exact.to(mine.dtype), exact, 0)
        assert torch.equal(got[2], expected[2].to(self.dtype))
        # What nothing goes to is left alone, bit for bit.
        assert torch.equal(got[1] == FILLER, (expected[1] == FILLER))


CONTIGUOUS = {"cache_seqlens": ints(3, 9)}
