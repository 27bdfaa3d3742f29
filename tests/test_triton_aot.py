"""The shipped launches of the Triton rotation, compiled for every supported chip without a GPU.

Run as a script, this file compiles and prints what it measured: compilation needs a process without
TRITON_INTERPRET, which the other tests set.
"""

from __future__ import annotations

import json
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
    dtype: str = "bfloat16"
    interleaved: bool = False
    angle_grad: bool = False
    head_dim: int = 128
    tokens: int = 65_536
    packed: bool = False  # with offsets and frequencies per sequence and per head
    decay: bool = False
    axes: bool = False

    def __str__(self) -> str:
        layout = "interleaved" if self.interleaved else "halves"
        direction = "angle_grad" if self.angle_grad else "forward"
        options = "".join(f"-{name}" for name in ("packed", "decay", "axes") if getattr(self, name))
        return (
            f"sm_{self.capability}-{self.dtype}-{layout}-{direction}-D{self.head_dim}"
            f"-T{self.tokens}{options}"
        )


def cases() -> list[Case]:
    """A sample, to keep this file near a minute on two cores.

    Register use follows from the width of the elements, the layout and the direction, so these meet
    on every chip in bfloat16; float32 (another width) and float16 (another conversion) on fewer.
    Other head dims keep the size of the tile: one chip. Left out: frequencies per head with decay
    and angle_grad at once, where sm_80 trades two registers (8 bytes of stack) for occupancy.
    """
    chips = (80, 86, 89, 90, 100, 120)
    kinds = [(layout, grad) for layout in (False, True) for grad in (False, True)]
    sample = [Case(chip, "bfloat16", *kind) for chip in chips for kind in kinds]
    sample += [Case(chip, "float32", *kind) for chip in (80, 90) for kind in kinds]
    sample += [Case(90, "float16", *kind) for kind in kinds]
    sample += [
        Case(86, interleaved=layout, head_dim=dim) for layout in (False, True) for dim in (64, 96)
    ]
    sample += [Case(chip, tokens=1) for chip in (90, 120)]
    sample += [Case(80, angle_grad=True, packed=True), Case(100, packed=True)]
    sample += [Case(80, angle_grad=True, decay=True), Case(100, decay=True)]
    sample += [Case(80, angle_grad=True, axes=True), Case(90, axes=True)]
    return sample


def launch(case: Case) -> None:
    """Call the launcher on tensors without storage: 32 heads of q, 8 of k (or 32, as per head)."""
    from extrope_kernels.ops.rope.rotation import Rotation
    from extrope_kernels.ops.rope.triton import rotate

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    packed, half, sequences = case.packed, case.head_dim // 2, 8
    dtype = getattr(torch, case.dtype)
    q = empty(1, case.tokens, 32, case.head_dim, dtype=dtype)
    k = empty(1, case.tokens, 32 if packed else 8, case.head_dim, dtype=dtype)
    positions = empty(sequences, dtype=torch.int64) if packed else None
    if case.axes:
        positions = empty(3, 1, case.tokens, dtype=torch.int64)
    rotation = Rotation(
        inv_freq=empty(sequences, 32, half) if packed else empty(1, 1, half),
        positions=positions,
        positions_are_offsets=packed,
        offset=0,
        cu_seqlens=empty(sequences + 1, dtype=torch.int32) if packed else None,
        log_decay=empty(half) if case.decay else None,
        decay_signs=(1.0, -1.0),
        amplitude=1.0,
        conjugate=case.angle_grad,
        interleaved=case.interleaved,
        axes=empty(half, dtype=torch.int32) if case.axes else None,
    )
    angle_grad = empty(1, case.tokens, 32 if packed else 1, half) if case.angle_grad else None
    outputs = [torch.empty_like(q), torch.empty_like(k)]
    rotate([q, k], outputs, [q, k] if case.angle_grad else None, angle_grad, rotation)


def measure(case: Case) -> dict[str, int]:
    import aot

    from extrope_kernels.ops.rope.triton import launch as module

    (recorded,) = aot.record_launches(module, "rotate_kernel", lambda: launch(case))
    binary = aot.compile_launch(recorded, case.capability)
    return {
        "registers": binary.registers,
        "stack": binary.stack,
        "local": binary.local,
        "shared": binary.shared,
        "shared_limit": aot.SHARED_LIMIT[case.capability],
        "loads": binary.count(r"\bLDG\."),
        "loads_of_16_bytes": binary.count(r"\bLDG\.E\S*\.128\b"),
        "stores": binary.count(r"\bSTG\."),
        "stores_of_16_bytes": binary.count(r"\bSTG\.E\S*\.128\b"),
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
    "case", [case for case in cases() if case.tokens > 1 and not case.packed], ids=str
)
def test_16_byte_accesses(case, measured):
    found = measured[str(case)]
    assert found["stores_of_16_bytes"] == found["stores"], found
    # The loops over the heads of q and of k; only frequencies and positions are read in less.
    tensors = 2 if case.angle_grad else 1
    assert found["loads_of_16_bytes"] >= 2 * 2 * tensors, found


if __name__ == "__main__":
    asked = [Case(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps({str(case): measure(case) for case in asked}))
