"""What a plan settles of a kernel's parameters: by name, and started by place."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from extrope_kernels.ops._shared.triton.launch import Plan  # noqa: E402


@triton.jit
def some_kernel(x, size, offset, TILE: triton.language.constexpr):
    pass


def plan(**settled) -> Plan:
    return Plan(some_kernel, (1,), torch.empty(0), num_warps=1, **settled)


def test_names_in_any_order():
    assert plan(TILE=3, offset=None, size=1).settled == (1, None, 3)
    assert plan(TILE=3).settled == (3,)


@pytest.mark.parametrize(
    "settled, wrong",
    [
        ({"size": 1, "TILE": 3}, "offset, size"),  # one is left out
        ({"offset": 2, "TILE": 3, "tile": 3}, "size, tile"),  # one is not a parameter
        ({"x": 0, "TILE": 3}, "offset, x"),  # one comes first, with what changes from call to call
    ],
)
def test_what_is_not_the_last_parameters(settled, wrong):
    message = rf"^some_kernel: its last {len(settled)} parameters differ by {wrong}$"
    with pytest.raises(TypeError, match=message):
        plan(**settled)


def test_what_is_left_to_triton():
    options = Plan(some_kernel, (1,), torch.empty(0), num_warps=2, maxnreg=None, TILE=3).options
    assert options == {"num_warps": 2}
