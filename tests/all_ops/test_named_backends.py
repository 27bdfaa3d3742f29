"""A named backend runs its own op, and never falls back to another's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.operations import OPERATIONS, SCORES, TINY

from extrope_kernels.testing import device

CASES = [
    (name, named)
    for name, operation in OPERATIONS.items()
    for named in operation.backends
    if name.split(",")[0] not in {*SCORES} - {"rerope"} | {"merge"}  # which is not named
]


@pytest.mark.skipif(device() != "cpu", reason="on a GPU the op without a suffix is Triton's too")
@pytest.mark.parametrize("name, named", CASES)
def test_only_the_ops_of_a_named_backend_run(name, named):
    operation = replace(OPERATIONS[name], sizes=TINY)
    tensors = operation.tensors(0, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operation(named, **tensors)
    ran = {event.key for event in profile.key_averages() if event.key.startswith("extrope::")}
    if named == "reference":
        assert not ran
    else:
        assert ran and {op.endswith("_triton") for op in ran} == {named == "triton"}, ran
