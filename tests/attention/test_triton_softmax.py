"""The device functions of caps and sinks: one place for all Triton kernels of attention."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from extrope_kernels.ops.attention.triton.device import add_sink, softcap, tanh  # noqa: E402
from extrope_kernels.testing import device  # noqa: E402

N = 1024
LN_2 = math.log(2)


@triton.jit
def _tanh(x, out, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, tanh(tl.load(x + n)))


@triton.jit
def _capped(x, out, SOFTCAP: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, SOFTCAP * softcap(tl.load(x + n), 1.0, SOFTCAP))


@triton.jit
def _with_sinks(row_max, row_sum, sinks, sums, out, N: tl.constexpr):
    n = tl.arange(0, N)
    top, total, rescale = add_sink(tl.load(row_max + n), tl.load(row_sum + n), tl.load(sinks + n))
    tl.store(sums + n, top + tl.log2(total))
    tl.store(out + n, rescale / total)


def spread(sign: int) -> torch.Tensor:
    """From the least normal number to where tanh has long been 1."""
    return sign * torch.logspace(-37.9, 3, N, base=10, device=device())


@pytest.mark.parametrize("sign", (1, -1))
def test_tanh_is_as_exact_near_0_as_elsewhere(sign):
    x = torch.cat((spread(sign), sign * torch.linspace(0.01, 12, 7 * N, device=device())))
    out = torch.empty_like(x)
    _tanh[(1,)](x, out, N=len(x))
    exact = x.double().tanh()
    assert ((out.double() - exact) / exact).abs().max() < 4 * torch.finfo(torch.float32).eps
    assert out.abs().max() <= 1


def test_tanh_of_what_is_no_number():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], device=device())
    x = torch.nn.functional.pad(x, (0, 3))
    out = torch.empty_like(x)
    _tanh[(1,)](x, out, N=8)
    torch.testing.assert_close(out, x.tanh(), equal_nan=True)


@pytest.mark.parametrize("cap", (1e-3, 1.5, 50.0, 1e4))
def test_a_cap_far_away_changes_nothing(cap):
    x = spread(1).clamp(min=1e-30)  # the quotient is a normal number too
    out = torch.empty_like(x)
    _capped[(1,)](x, out, SOFTCAP=cap, N=N)
    exact = cap * (x.double() / cap).tanh()
    assert ((out.double() - exact) / exact).abs().max() < 6 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("sink", (-torch.inf, -80.0, 0.0, 3.5, 90.0, torch.inf, torch.nan))
def test_sinks_join_a_row(sink):
    """Rows without keys (their maximum is finite), of one key, of many."""
    row_max = torch.tensor([-1e30, 2.0, -7.0, 40.0], device=device())
    row_sum = torch.tensor([0.0, 1.0, 300.0, 2.5], device=device())
    sums, weights = torch.empty_like(row_max), torch.empty_like(row_max)
    sinks = torch.full_like(row_max, sink / LN_2)
    _with_sinks[(1,)](row_max, row_sum, sinks, sums, weights, N=4)
    before = torch.where(row_sum == 0, -torch.inf, row_max * LN_2 + row_sum.log()).double()
    after = torch.logaddexp(before, torch.full_like(before, sink))
    if sink == -torch.inf:
        weights[0] = 0.0  # of an empty row, which callers know by its sum
    torch.testing.assert_close(sums.double() * LN_2, after, rtol=1e-6, atol=1e-6, equal_nan=True)
    empty = torch.nan if math.isnan(sink) else 0.0
    expected = torch.where(before == -torch.inf, empty, (before - after).exp() / row_sum)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-37, equal_nan=True)
