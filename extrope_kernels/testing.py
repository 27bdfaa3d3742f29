"""Shared by tests and benchmarks: inputs, backends that can run here, and the error budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import attention, rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The largest error of the PyTorch reference in each dtype, by the largest value: twice what was
# measured over 6,000 comparisons. A reference that is further off is wrong, not rounded.
_REFERENCE_ERROR = {
    torch.bfloat16: 0.16,
    torch.float16: 0.004,
    torch.float32: 0.012,
    torch.float64: 1e-12,
}


def device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_backends() -> list[str]:
    """Return the backends of the rotation that run on `device()`."""
    return _running_here(rope.backends())


def attention_backends() -> list[str]:
    """Return the backends of attention that run on `device()`."""
    return _running_here(attention.backends())


def _running_here(reports: dict[str, str]) -> list[str]:
    other = "cpu" if device() == "cuda" else "cuda"
    return [name for name, report in reports.items() if report == "available" and name != other]


def make_qk(
    batch: int = 2,
    seqlen: int = 13,
    heads_q: int = 3,
    heads_k: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw normal q (batch, seqlen, heads_q, head_dim) and k with heads_k heads, on `device()`."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, seqlen, heads_q, head_dim, generator=generator)
    k = torch.randn(batch, seqlen, heads_k, head_dim, generator=generator)
    return q.to(device(), dtype), k.to(device(), dtype)


def assert_within_budget(
    name: str,
    out: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    extra_ulps: float = 0.0,
    noise: float = 0.0,
) -> None:
    """Fail when `out` is further from the float64 result than the error budget allows.

    The budget is twice the largest error of the PyTorch reference in out's own dtype. That error is
    bounded too, so that a mistake in both widens nothing. If it is tiny by chance, the budget is
    the unavoidable error: one rounding to the dtype and five in float32 (cosine, sine, two
    products, a sum), each half an ulp of the largest value. `extra_ulps` adds units in the last
    place of the dtype, for a documented defect; `noise` adds an absolute error, for terms that
    cancel.
    """
    assert out.shape == exact.shape and out.dtype == same_dtype.dtype, (
        f"{name}: {tuple(out.shape)} {out.dtype}, expected {tuple(exact.shape)} {same_dtype.dtype}"
    )
    if out.numel() == 0:
        return
    ulp = torch.finfo(out.dtype).eps
    ulp_inside = min(torch.finfo(torch.float32).eps, ulp)
    largest = exact.abs().max().item()
    error = (out.double() - exact).abs().max().item()
    reference_error = (same_dtype.double() - exact).abs().max().item()
    allowed = _REFERENCE_ERROR[out.dtype] * largest + noise
    assert reference_error <= allowed, (
        f"{name}: the reference's own error {reference_error:.3g} exceeds {allowed:.3g}"
    )
    unavoidable = (ulp / 2 + 5 * ulp_inside / 2) * largest
    budget = max(2 * reference_error, unavoidable) + extra_ulps * ulp * largest + noise
    assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g}"
