"""What the Triton permutation reads and writes, and what it compiles to for every chip.

Run as a script, this file compiles and prints what it measured: compilation needs a process without
TRITON_INTERPRET, which the other tests set.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

from extrope_kernels import head_permutations
from extrope_kernels.ops.permute.power import Power
from extrope_kernels.ops.permute.reference import source_lanes

CHIPS = (80, 86, 89, 90, 100, 120)
DTYPES = ("bfloat16", "float32", "float64")


def power(permutations: torch.Tensor, **fields) -> Power:
    given = {"positions": None, "positions_are_offsets": False, "offset": 0}
    given |= {"cu_seqlens": None, "inverse": False}
    return Power(permutations, **(given | fields))


def check(inputs: list[torch.Tensor], by: Power, gap: int = 8) -> None:
    from rope_oracle import BITS, guarded_like

    from extrope_kernels.ops.permute.triton import permute

    outputs = [guarded_like(x, gap) for x in inputs]
    permute(inputs, [out.tensor for out in outputs], by)
    lanes = source_lanes(by, inputs[0].shape[1])
    for x, out in zip(inputs, outputs, strict=True):
        of_heads = lanes.repeat_interleave(x.shape[2] // lanes.shape[2], 2).expand(x.shape)
        bits = BITS[x.itemsize]
        assert torch.equal(out.tensor.view(bits), x.gather(-1, of_heads).view(bits))
        out.assert_untouched_around()


@pytest.mark.parametrize("gap", (1, 2, 8), ids=lambda gap: f"gap {gap}")
def test_transposed_memory_and_unaligned_rows(gap):
    from rope_oracle import DEVICE, randn

    q = randn(2, 4, 5, 24 + gap, dtype=torch.float16).transpose(1, 2)[..., gap:]
    k = randn(2, 2, 5, 24, dtype=torch.float16).transpose(1, 2)
    check([q, k], power(head_permutations(2, 24).to(DEVICE), offset=10**6), gap)


@pytest.mark.parametrize("ends", ((5, 9, 30, -4), (-3, -2, -1, 0), (90, 2, 60, 1)))
def test_no_cu_seqlens_reads_out_of_bounds(ends):
    from rope_oracle import DEVICE, guarded_like, randn

    from extrope_kernels.ops.permute.triton import permute

    x = randn(1, 11, 1, 16)
    out = guarded_like(x)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    permute([x], [out.tensor], power(head_permutations(1, 16).to(DEVICE), cu_seqlens=cu_seqlens))
    assert torch.isin(out.tensor, x).all()
    out.assert_untouched_around()


@pytest.mark.parametrize("given", ("zeros", "tails", "outside"))
def test_no_permutations_lead_out_of_bounds(given):
    from rope_oracle import DEVICE, guarded_like, randn

    from extrope_kernels.ops.permute.triton import permute

    rows = {
        "zeros": torch.zeros(1, 24, dtype=torch.int64),
        "tails": torch.arange(24).sub(1).clamp(0)[None].contiguous(),
        "outside": torch.randint(-(2**62), 2**62, (1, 24)),
    }[given].to(DEVICE)
    x = randn(1, 5, 1, 24)
    for offset in (3, 2**62):
        out = guarded_like(x)
        permute([x], [out.tensor], power(rows, offset=offset))
        for row, permuted in zip(x[0], out.tensor[0], strict=True):
            assert torch.isin(permuted, row).all()
        out.assert_untouched_around()


# -------------------------------------------------------------------------------------------------
# Ahead of time


def measure(chip: int, dtype: str) -> dict[str, int]:
    import aot

    from extrope_kernels.ops.permute.triton import launch as module

    def call():
        shape = {"device": "meta", "dtype": getattr(torch, dtype)}
        tensors = [torch.empty(1, 65_536, heads, 128, **shape) for heads in (32, 8)]
        rows = torch.empty(8, 128, device="meta", dtype=torch.int64)
        positions = torch.empty(1, 65_536, device="meta", dtype=torch.int64)
        outs = [torch.empty_like(x) for x in tensors]
        module.permute(tensors, outs, power(rows, positions=positions))

    found = {}
    for name in ("cycles_kernel", "permute_kernel"):
        other = "permute_kernel" if name == "cycles_kernel" else "cycles_kernel"
        (recorded,) = aot.record_launches(
            module, name, lambda other=other: aot.record_launches(module, other, call)
        )
        binary = aot.compile_launch(recorded, chip)
        found[name] = {
            "stack": binary.stack + binary.local,
            "shared_left": aot.SHARED_LIMIT[chip] - binary.shared,
            "stores": binary.count(r"\bSTG\."),
            "stores_of_16_bytes": binary.count(r"\bSTG\.E\S*\.128\b"),
        }
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["TRITON_ALWAYS_COMPILE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_no_spills_and_16_byte_stores(chip, dtype, measured):
    for name, found in measured[f"{chip} {dtype}"].items():
        assert found["stack"] == 0 and found["shared_left"] >= 0, (name, found)
        if name == "permute_kernel":
            assert found["stores_of_16_bytes"] == found["stores"] > 0, found


if __name__ == "__main__":
    print(json.dumps({f"{c} {d}": measure(c, d) for c, d in itertools.product(CHIPS, DTYPES)}))
