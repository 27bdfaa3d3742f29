"""The shipped launches over a key/value cache, compiled for every supported chip without a GPU.

Run as a script, this file compiles and prints what it measured: compilation needs a process without
TRITON_INTERPRET, which the other tests set.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")


@dataclass(frozen=True)
class Case:
    capability: int
    head_dim: int = 128
    dtype: str = "bfloat16"
    factor: float = math.inf
    grouped: bool = False
    interleaved: bool = False
    rotary_dim: int | None = None
    paged: bool = True
    seqlen_q: int = 1
    kernel: str = "decode"

    def __str__(self) -> str:
        return (
            f"{self.kernel}-sm_{self.capability}-D{self.head_dim}-{self.dtype}-f{self.factor}"
            f"{'-grouped' * self.grouped}{'-interleaved' * self.interleaved}"
            f"{f'-R{self.rotary_dim}' if self.rotary_dim else ''}-{'paged' * self.paged}"
            f"-S{self.seqlen_q}"
        )


def cases() -> list[Case]:
    """A sample, to keep this file near a minute on two cores: one token in bfloat16 at the head
    dims that take the most registers on every chip; the rest where it was found to be tightest.
    """
    chips = (80, 86, 89, 90, 100, 120)
    sample = [Case(chip, dim) for chip in chips for dim in (128, 256)]
    sample += [Case(120, 64), Case(86, 96), Case(90, 64, "float16"), Case(80, 128, "float16")]
    sample += [Case(80, factor=4.0), Case(90, 256, factor=4.0, grouped=True)]
    sample += [Case(120, interleaved=True), Case(90, 256, "float32")]
    sample += [Case(120, seqlen_q=64), Case(120, 64, seqlen_q=64, paged=False)]
    sample += [Case(90, 256, kernel="merge")]
    sample += [Case(80, 256, factor=4.0, seqlen_q=64, kernel="append")]
    return sample


def launch(case: Case) -> None:
    """Call the launcher on tensors without storage: 32 heads of q, 8 of k, room for 32k keys."""
    from extrope_kernels.ops.attention.frames import Call
    from extrope_kernels.ops.attention.kvcache_arguments import KVCache
    from extrope_kernels.ops.attention.regions import ReRope
    from extrope_kernels.ops.attention.triton import launch_decode

    def empty(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or getattr(torch, case.dtype), device="meta")

    batch, pages, page_size = 2, 4096, 16
    k = (
        empty(pages, page_size, 8, case.head_dim)
        if case.paged
        else empty(batch, 32768, 8, case.head_dim)
    )
    table = empty(batch, pages // batch, dtype=torch.int32) if case.paged else None
    seqlens = empty(batch, dtype=torch.int32)
    cache = KVCache(k, torch.empty_like(k), seqlens, table, seqlens)
    inv_freq = empty((case.rotary_dim or case.head_dim) // 2, dtype=torch.float32)
    score = ReRope(4096, case.factor, case.grouped)
    call = Call(score, inv_freq, log_n=4096.0, interleaved=case.interleaved)
    rows = empty(batch, case.seqlen_q, 32, case.head_dim)
    if case.kernel == "append":
        launch_decode.append(cache, rows[:, :, :8], rows[:, :, :8], call)
    else:
        launch_decode.decode(rows, cache, call)


def measure(case: Case) -> dict[str, int]:
    from unittest import mock

    import aot

    from extrope_kernels.ops.attention.triton import launch_decode as module

    others = {"decode_kernel", "merge_kernel", "append_kernel"} - {f"{case.kernel}_kernel"}
    with mock.patch.multiple(module, **dict.fromkeys(others, mock.MagicMock())):
        (recorded,) = aot.record_launches(module, f"{case.kernel}_kernel", lambda: launch(case))
    binary = aot.compile_launch(recorded, case.capability)
    return {
        "registers": binary.registers,
        "stack": binary.stack,
        "local": binary.local,
        "shared": binary.shared,
        "shared_limit": aot.SHARED_LIMIT[case.capability],
        "products": binary.count(r"\b(HMMA|HGMMA|QMMA|UTCHMMA|UTCMMA|UTC\w*MMA)\b"),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["TRITON_ALWAYS_COMPILE"] = "1"
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


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if case.kernel == "decode" and case.dtype != "float32"],
    ids=str,
)
def test_products_on_tensor_cores(case, measured):
    assert measured[str(case)]["products"] > 0


if __name__ == "__main__":
    asked = [Case(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps({str(case): measure(case) for case in asked}))
