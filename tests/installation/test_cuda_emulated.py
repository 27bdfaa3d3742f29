"""The CUDA rotation, compiled for the host: its results, and what the sanitizers say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # rope_oracle also serves the Triton tests

from support.emulation import harness
from support.emulation.cases import GROUPS, Case, case, qk, short
from support.rope_oracle import BITS, rope_rotation

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels themselves run on the GPU"
)


def run_group(
    group: Callable[[], Iterator[Case]], sanitizer: harness.Sanitizer, modules: Path
) -> list[Case]:
    torch.manual_seed(0)
    cases = list(group())
    harness.run([one.job() for one in cases], sanitizer, modules)
    return cases


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_results_and_sanitizers(group, modules):
    cases = run_group(group, harness.ADDRESS, modules)
    threaded = run_group(group, harness.THREAD, modules)
    failures = []
    for one, other in zip(cases, threaded, strict=True):
        try:
            one.check()
            for a, b in zip(one.results(), other.results(), strict=True):
                assert torch.equal(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize])), (
                    "the two workers differ from one"
                )
        except AssertionError as error:
            failures.append(f"{one.name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("ends", ((5, 9, 30, -4), (-3, -2, -1, 0), (7, 7, 7, 7), (90, 2, 60, 1)))
def test_no_cu_seqlens_leads_out_of_bounds(ends, modules):
    rows = rope_rotation(64).inv_freq * torch.rand(3, 1, 1)
    starts = torch.tensor(ends, dtype=torch.int32)
    by = {"cu_seqlens": starts, "inv_freq": rows, "positions_are_offsets": True}
    one = case("ends", qk(batch=1, seqlen=11), positions=torch.arange(3), **by)
    harness.run([one.job()], harness.ADDRESS, modules)


def test_a_huge_position_is_harmless(modules):
    for position in (2**62, -(2**62), 2**31):
        one = case("huge", qk(), positions=torch.full((2, 5), position))
        harness.run([one.job()], harness.ADDRESS, modules)


# -------------------------------------------------------------------------------------------------
# The harness can fail


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short)
def test_a_head_too_many_is_caught(dtype, modules):
    job = case("too-many", qk(dtype=dtype), gap=0).job()
    job.request["tensors"][1]["heads"] += 1
    with pytest.raises(harness.SanitizerError, match="heap-buffer-overflow"):
        harness.run([job], harness.ADDRESS, modules)


def test_a_position_too_few_is_caught(modules):
    job = case("too-few", qk(), positions=torch.arange(10).view(2, 5)).job()
    job.request["params"]["seqlen"] += 1
    with pytest.raises(harness.SanitizerError, match="heap-buffer-overflow"):
        harness.run([job], harness.ADDRESS, modules)


def test_two_threads_that_write_one_row_are_caught(modules):
    job = case("race", qk(heads=(1,), seqlen=64)).job()
    job.request["tensors"][0]["out_seq"] = 0
    with pytest.raises(harness.SanitizerError, match="data race"):
        harness.run([job], harness.THREAD, modules)
