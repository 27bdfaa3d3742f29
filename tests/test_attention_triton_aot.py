"""The shipped launches of region attention, compiled for every supported chip without a GPU.

Run as a script, this file compiles and prints what it measured: compilation needs a process without
TRITON_INTERPRET, which the other tests set.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

TENSOR_CORE = r"\b(?:HMMA|HGMMA|UTCHMMA)\b"
EXPONENTIAL = r"\bMUFU\.EX2\b"
CHIPS = (80, 86, 89, 90, 100, 120)
KERNELS = ("forward", "dq", "dkv")


@dataclass(frozen=True)
class Case:
    kernel: str
    capability: int
    head_dim: int = 128
    dtype: str = "bfloat16"
    regions: int = 2  # 1 is plain attention, 2 ReRoPE, 3 dual chunk attention
    packed: bool = False  # with row_scale
    window: int = 2048
    seqlen: int = 65_536

    def __str__(self) -> str:
        options = "-packed" if self.packed else ""
        return (
            f"{self.kernel}-sm_{self.capability}-D{self.head_dim}-{self.dtype}"
            f"-R{self.regions}{options}"
        )


def plain(case: Case) -> Case:
    return replace(case, regions=1)


def cases() -> list[Case]:
    """A sample, to keep this file near two minutes on two cores.

    The common head_dim on every chip; the others where their configuration, or the instructions
    that it makes of it, differ; float16 and three regions where registers are fewest to spare.
    """
    sample = [Case(kernel, chip) for kernel in KERNELS for chip in CHIPS if chip != 89]
    sample += [Case("forward", 89)]
    sample += [Case("forward", chip, dim) for chip in (80, 90, 100, 120) for dim in (64, 256)]
    sample += [Case(kernel, chip, 64) for kernel in ("dq", "dkv") for chip in (80, 90)]
    sample += [Case(kernel, chip, 256) for kernel in ("dq", "dkv") for chip in (86, 90)]
    sample += [Case("forward", 86, 96), Case("dq", 80, 96), Case("dq", 90, 96), Case("dkv", 90, 96)]
    sample += [Case("forward", 90, dtype="float16", regions=3), Case("dq", 120, dtype="float16")]
    sample += [Case(kernel, 80, packed=True) for kernel in KERNELS]
    return sample


# One chip of each kind of tensor core instructions, and one with less shared memory.
COMPARED = [Case("forward", chip) for chip in (80, 90, 100, 120)]
COMPARED += [Case("dq", 90), Case("dkv", 80)]


def launch(case: Case) -> None:
    """Call the launcher on tensors without storage: 32 heads of q, 8 of k."""
    from extrope_kernels.ops.attention.regions import FIRST_KEY, Layout
    from extrope_kernels.ops.attention.triton import backward, forward

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    starts = {
        1: (FIRST_KEY,),
        2: (FIRST_KEY, 1 - case.window),
        3: (FIRST_KEY, -case.window, 0),
    }[case.regions]
    row_scale = empty(case.seqlen) if case.packed else None
    cu_seqlens = empty(9, dtype=torch.int32) if case.packed else None
    by = Layout(starts, case.window if case.regions == 3 else 1, 0.1, row_scale, cu_seqlens)
    batch, dtype = () if case.packed else (1,), getattr(torch, case.dtype)
    q = [empty(*batch, case.seqlen, 32, case.head_dim, dtype=dtype) for _ in starts]
    k = [empty(*batch, case.seqlen, 8, case.head_dim, dtype=dtype) for _ in starts]
    if case.kernel == "forward":
        forward(q, k, k[0], by)
    else:
        lse = empty(*batch, 32, case.seqlen)
        backward(q[0], None, q, k, k[0], q[0], lse, by)


def record(case: Case):
    """The launch of case.kernel; the other kernels' launches go nowhere."""
    import aot

    from extrope_kernels.ops.attention.triton import launch as module

    call = functools.partial(launch, case)
    for other in {*KERNELS, "delta"} - {case.kernel}:
        call = functools.partial(aot.record_launches, module, f"{other}_kernel", call)
    with (
        mock.patch.object(module, "_capability", lambda device: case.capability),
        mock.patch.object(module, "_interpreted", lambda: False),
    ):
        (recorded,) = aot.record_launches(module, f"{case.kernel}_kernel", call)
    return recorded


def measure(case: Case) -> dict:
    import aot

    binary = aot.compile_launch(record(case), case.capability)
    loops = [loop for loop in binary.loops() if re.search(TENSOR_CORE, loop)]
    return {
        "registers": binary.registers,
        "stack": binary.stack,
        "local": binary.local,
        "shared": binary.shared,
        "shared_limit": aot.SHARED_LIMIT[case.capability],
        "tensor_core": [len(re.findall(TENSOR_CORE, loop)) for loop in loops],
        "exponentials": [len(re.findall(EXPONENTIAL, loop)) for loop in loops],
        "instructions": [loop.count("\n") + 1 for loop in loops],
    }


def count_compilations() -> int:
    """How many binaries launches that differ in every number of a call need."""
    import aot

    from extrope_kernels.ops.attention.triton.forward import forward_kernel

    base = Case("forward", 80, head_dim=64)
    for case in (base, replace(base, window=1, seqlen=8191), replace(base, window=16, seqlen=1024)):
        aot.compile_launch(record(case), 80)
    return len(forward_kernel.device_caches[80][0])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    asked = json.dumps([asdict(case) for case in {*cases(), *COMPARED, *map(plain, COMPARED)}])
    command = [sys.executable, __file__]
    result = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_no_spills_and_within_shared_memory(case, measured):
    found = measured[str(case)]
    assert found["stack"] == 0 and found["local"] == 0, found
    assert found["shared"] <= found["shared_limit"], found


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_a_tile_costs_what_it_costs_in_plain_attention(case, measured, record_property):
    """Masked and full loops, of the far and of the near region: the same work for each tile."""
    found, yardstick = measured[str(case)], measured[str(plain(case))]
    assert len(yardstick["tensor_core"]) == 2 and len(found["tensor_core"]) == 4, found
    for kind in ("tensor_core", "exponentials"):
        assert set(found[kind]) == set(yardstick[kind]) and len(set(found[kind])) == 1, found
    # The full loops are the shorter ones: those of far and near keys against that of plain ones.
    ratio = sorted(found["instructions"])[1] / min(yardstick["instructions"])
    record_property("instructions of a full tile, ratio to plain attention", round(ratio, 3))
    assert ratio < 1.1, found


def test_no_window_or_length_compiles_again(measured):
    assert measured["compilations"] == 1


if __name__ == "__main__":
    asked = [Case(**fields) for fields in json.load(sys.stdin)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(map(str, asked), pool.map(measure, asked), strict=True))
    print(json.dumps({**found, "compilations": count_compilations()}))
