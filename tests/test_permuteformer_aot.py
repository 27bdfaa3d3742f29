"""The shipped launches of linear attention, compiled for every supported chip without a GPU.

Run as a script, this file compiles and prints what it measured: compilation needs a process without
TRITON_INTERPRET, which the other tests set.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from unittest import mock

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

CHIPS = (80, 86, 89, 90, 100, 120)
PASSES = ("forward", "dq", "dk", "dv")  # the four sweeps: one kernel, compiled differently


@dataclass(frozen=True)
class Case:
    sweep: str
    capability: int
    dim: int = 64
    dtype: str = "bfloat16"
    kernel: str = "sweep"
    causal: bool = True
    packed: bool = False

    def __str__(self) -> str:
        options = ("" if self.causal else "-bidirectional") + ("-packed" if self.packed else "")
        return f"{self.sweep}-{self.kernel}-sm_{self.capability}-D{self.dim}-{self.dtype}{options}"


def cases() -> list[Case]:
    """A sample: every sweep and chip at the common head_dim, every dim on the tightest chips."""
    sample = [Case("forward", chip) for chip in CHIPS]
    sample += [Case("dq", chip, 128) for chip in (80, 90, 120)]
    sample += [Case("dk", chip, 128) for chip in (86, 100)]
    sample += [Case("dv", 90, 128), Case("forward", 100, 128), Case("dk", 90)]
    sample += [Case("forward", 90, 256), Case("dq", 86, 256), Case("dk", 120, 256)]
    sample += [Case("forward", 80, 128, kernel="gather"), Case("dk", 120, 256, kernel="gather")]
    sample += [Case("dk", 90, 128, dtype="float32"), Case("forward", 86, dtype="float16")]
    sample += [Case("forward", 80, causal=False), Case("dk", 90, packed=True)]
    return sample


def launch(case: Case) -> None:
    """Call the launcher on tensors without storage: 32 heads of q, 8 of k, 64k tokens."""
    from extrope_kernels.ops.permuteformer.sweep import Sweep
    from extrope_kernels.ops.permuteformer.triton import sweep

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, dtype, seqlen = () if case.packed else (1,), getattr(torch, case.dtype), 65_536
    q, k = (empty(*batch, seqlen, heads, case.dim, dtype=dtype) for heads in (32, 8))
    numbers = empty(*batch, 32, seqlen)
    decay = empty(8) if case.causal else None
    cu_seqlens = empty(9, dtype=torch.int32) if case.packed else None
    by = functools.partial(Sweep, 8, decay, cu_seqlens, case.causal)
    if case.sweep == "forward":
        sweep(q, k, k, by(normalize=True))
    elif case.sweep == "dq":
        sweep(q, k, k, by(phi_scores=False, gate=q, x_scale=numbers, x_extra=numbers))
    elif case.sweep == "dk":
        given = {"reverse": True, "gate": k, "y_scale": numbers, "y_extra": numbers}
        sweep(k, q, q, by(phi_scores=False, **given))
    else:
        sweep(k, q, q, by(reverse=True, y_scale=numbers))


def record(case: Case):
    """The launch of case.kernel; the other kernels' launches go nowhere."""
    import aot

    from extrope_kernels.ops.permuteformer.triton import launch as module

    call = functools.partial(launch, case)
    for other in {"gather", "chain", "sweep"} - {case.kernel}:
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
    return {
        "registers": binary.registers,
        "stack": binary.stack,
        "local": binary.local,
        "shared": binary.shared,
        "shared_limit": aot.SHARED_LIMIT[case.capability],
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    asked = json.dumps([asdict(case) for case in cases()])
    command = [sys.executable, __file__]
    result = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_no_spills_and_within_shared_memory(case, measured):
    found = measured[str(case)]
    assert found["stack"] == 0 and found["local"] == 0, found
    assert found["shared"] <= found["shared_limit"], found


if __name__ == "__main__":
    asked = [Case(**fields) for fields in json.load(sys.stdin)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(map(str, asked), pool.map(measure, asked), strict=True))
    print(json.dumps(found))
