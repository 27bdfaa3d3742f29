"""A named backend runs its own op, and never falls back to another's."""

from __future__ import annotations

import pytest
import torch
from support.operations import OPERATIONS, SCORES

from extrope_kernels.testing import device

ONE_SCORE = {f"{name}{end}" for name in SCORES if name != "rerope" for end in ("", ", backward")}
CASES = [
    (name, named)
    for name, operation in OPERATIONS.items()
    for named in operation.backends
    if name not in ONE_SCORE and not name.startswith("merge")  # which is not named
    if f"{name}, backward" not in OPERATIONS  # which runs the forward, too
]


@pytest.mark.skipif(device() != "cpu", reason="on a GPU the op without a suffix is Triton's too")
@pytest.mark.parametrize("name, named", CASES)
def test_only_the_ops_of_a_named_backend_run(name, named):
    operation = OPERATIONS[name]
    tensors = {}
    for argument, (*sizes, last) in operation.shapes.items():
        # One sequence, of few tokens; all heads.
        few = [min(n, 5) if n != 700 else 40 for n in sizes]
        few[:1], few[2:3] = [1] * bool(sizes), sizes[2:3]
        tensors[argument] = torch.randn(*few, last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operation.run(named, **tensors)
    ran = {event.key for event in profile.key_averages() if event.key.startswith("extrope::")}
    if named == "reference":
        assert not ran
    else:
        assert ran and {op.endswith("_triton") for op in ran} == {named == "triton"}, ran
