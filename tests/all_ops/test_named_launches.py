"""A launch takes what its kernel takes, by name, or is refused when it is built."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from extrope_kernels.ops._math.triton.launch import INTERPRETED, Launch

ONE = torch.ones(1)


@triton.jit
def scaled_kernel(x, y, offset: tl.int64, untyped, stride, count, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    valid = index < count
    total = tl.load(x + index * stride, mask=valid) + (offset + untyped)
    tl.store(y + index, total, mask=valid)


def build(**changes) -> Launch:
    given = {
        "numbers": {"untyped": 0, "stride": 2, "count": 3},
        "constants": {"SIZE": 4},
        "options": {"num_warps": 1},
        "per_call": ("offset",),
        **changes,
    }
    return Launch(scaled_kernel, (1,), **given)


@pytest.mark.skipif(not INTERPRETED, reason="tensors of the CPU")
def test_arguments_go_where_their_names_say():
    x, y = torch.arange(8.0), torch.full((4,), -1.0)
    launch = build(numbers={"count": 3, "stride": 2, "untyped": 0})
    launch.run(offset=10, y=y, x=x)
    assert y.tolist() == [10, 12, 14, -1]


@pytest.mark.parametrize(
    ("changes", "error"),
    (
        ({"constants": {}}, "scaled_kernel: missing, or no constants: SIZE"),
        ({"constants": {"SIZE": 4, "count": 3}}, "missing, or no constants: count"),
        ({"numbers": {"untyped": 0, "strides": 2, "count": 3}}, "has no numbers strides"),
        (
            {"numbers": {"stride": 2, "count": 3}, "per_call": ("offset", "untyped")},
            "untyped may differ in every call, so its type must be annotated",
        ),
        # A number that is forgotten stands where tensors do not.
        ({"numbers": {"untyped": 0, "count": 3}}, "got x, y, stride as tensors"),
        ({"per_call": ()}, "offset has a type"),
    ),
)
def test_what_the_kernel_does_not_take_is_refused_when_built(changes, error):
    with pytest.raises(TypeError, match=re.escape(error)):
        build(**changes)


@pytest.mark.parametrize(
    "given", ({"x": ONE, "y": ONE}, {"x": ONE, "y": ONE, "offset": 1, "count": 3}), ids=str
)
def test_a_call_gives_all_names_and_no_other(given):
    name = "count" if "count" in given else "offset"
    with pytest.raises(TypeError, match=f"scaled_kernel\\(\\) .*'{name}'"):
        build().run(**given)
