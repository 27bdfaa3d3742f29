"""bench/gpu_audit.py: machine code is read and bounded rightly; what ships compiles. No GPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

import gpu_audit
import machine_code
from machine_code import AMD_SHARED, CARDS, CHIPS, Code, Stretch, Traffic, code_of, seconds

ROOT = Path(__file__).parents[2]
USAGE = "REG:64 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:400"
SASS = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R0, R0 ;
.L_x_2:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R8], [R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R6, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   STG.E.64 [R2.64], R4 ;
        /*0070*/                   NOP ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
"""


def test_loops_are_told_from_what_lies_around_them():
    code = code_of(USAGE, SASS, warps=4, shared=2048)
    assert (code.registers, code.stack, code.shared) == (64, 8, 2048)
    (loop,) = code.loops
    assert (loop.instructions, loop.products, loop.loads) == (3, 1, Counter({16: 1}))
    assert (code.around.instructions, code.around.special) == (2, 1)
    assert code.outside.instructions == 3 and code.stores == Counter({8: 1})
    by_address = SASS.replace("`(.L_x_2)", "0x20").replace(
        "`(.L_x_1)", "0x10"
    )  # as cuobjdump has it
    assert code_of(USAGE, by_address, warps=4, shared=2048) == code


def test_a_bound_by_hand():
    """Bytes over bandwidth; instructions of all warps over four schedulers of each processor."""
    none = Stretch(0, 0, 0, Counter(), Counter())
    loop = replace(none, instructions=100, products=8, special=10)
    code = Code(
        128, 0, 0, 4, 0, Counter(), Counter(), replace(none, instructions=50), none, (loop,)
    )
    card, traffic = CARDS[90], Traffic(bytes=3.35e6, blocks=10, passes=(1000,), operations=4096.0)
    found = seconds(code, traffic, card)
    cycles = card.clock * card.processors
    assert found["memory"] == pytest.approx(1e-6)
    assert found["issue"] == pytest.approx(4 * (10 * 50 + 1000 * 100) / (4 * cycles))
    assert found["special"] == pytest.approx(4 * 1000 * 10 * 32 / (16 * cycles))
    # As few operations as mma.sync has: at its share of the peak.
    assert found["tensor"] == pytest.approx(1000 * 4096 / (card.tensor * 0.629))
    assert code.resident(CHIPS[90]) == 4  # 128 registers of 128 threads, of 65,536


def test_tiles_are_counted(monkeypatch):
    """Three tiles by hand: six on and under the diagonal; with a window of one tile, eight."""
    monkeypatch.setattr(gpu_audit, "SEQLEN", 3 * 64)
    count = gpu_audit.tiles.__wrapped__
    for by_key in (False, True):
        assert count((-3 * 64,), 1, 64, 64, by_key) == 6
        assert count((-3 * 64, 1 - 64), 1, 64, 64, by_key) == 8


def committed() -> list[dict[str, str]]:
    with gpu_audit.RESULT.open() as file:
        return list(csv.DictReader(file))


def test_the_committed_table_is_of_what_ships():
    rows = committed()
    assert list(rows[0]) == [field.name for field in fields(gpu_audit.Row)]
    assert {int(row["chip"]) for row in rows} == set(CARDS)
    assert {int(row["head_dim"]) for row in rows} == set(gpu_audit.HEAD_DIMS)
    known = {kernel for kernel, _ in gpu_audit.TRAFFIC.values()}
    assert {row["kernel"] for row in rows} <= known
    assert not [row for row in rows if int(row["stack"]) > gpu_audit.STACK]
    for row in rows:
        assert float(row["bound_us"]) == float(row[f"{row['bound_by']}_us"])


def test_faults_are_found():
    row = gpu_audit.Row(
        "rotation", "", 90, 128, 64, 0, 0, 32, 16, 16, *[0] * 3, *[1.0] * 5, "memory"
    )
    assert not row.fault()
    for change, word in (
        ({"stack": 20}, "stack"),
        ({"shared": 2**18}, "fits"),
        ({"warps_of_sm": 0}, "fits"),
        ({"widest_load": 8}, "16 bytes"),
    ):
        assert word in replace(row, **change).fault()


def audit(*words: str) -> str:
    command = [sys.executable, "bench/gpu_audit.py", "--keep-no-results", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.thorough
def test_a_kernel_compiles_as_the_table_says():
    """The merge, for every head_dim, on an H100; with the Triton of the table to the register."""
    lines = [line.split("  ") for line in audit("--chip", "90", "--only", "merge").splitlines()]
    found = {line[3]: int(line[4]) for line in lines if line[0] == "merge"}
    known = {row["head_dim"]: int(row["registers"]) for row in committed()
             if (row["kernel"], row["chip"]) == ("merge", "90")}  # fmt: skip
    assert found.keys() == known.keys()
    assert all(abs(found[dim] - known[dim]) <= 32 for dim in known)


@pytest.mark.thorough
@pytest.mark.parametrize("version", gpu_audit.TRITONS)
def test_every_triton_compiles_what_ships(version):
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        pytest.skip(f"{folder.name} is missing: bench/gpu_audit.py --triton {version} installs it")
    audit("--triton", version)


def amd_shared(chip: str, only: str) -> dict[str, int]:
    """Compile for an AMD chip, and return the most shared memory of each kernel."""
    lines = [line.split("  ") for line in audit("--chip", chip, "--only", only).splitlines()]
    rows = [line for line in lines if len(line) == len(fields(gpu_audit.AmdRow))]
    return {kernel: max(int(row[-1]) for row in rows if row[0] == kernel) for kernel, *_ in rows}


@pytest.mark.thorough
@pytest.mark.parametrize("chip", ["gfx1201", "gfx950"])
def test_a_chip_of_amd_without_tiles_takes_the_nearest_ones(chip):
    found = amd_shared(chip, "(decode RoPE|append one token) 64")
    assert set(found) == {"decode", "decode's append", "rotation and append"}


@pytest.mark.thorough
@pytest.mark.parametrize("chip", AMD_SHARED)
def test_every_kernel_compiles_for_amd_within_its_shared_memory(chip):
    found = amd_shared(chip, "")
    assert set(found) == {kernel for kernel, _ in gpu_audit.TRAFFIC.values()}
    assert max(found.values()) <= AMD_SHARED[chip]


def test_the_resources_of_an_amd_kernel_are_in_its_notes():
    notes = b"..\xab.vgpr_count\xcc\x80\xbb.private_segment_fixed_size\xcd\x02\x10.."
    assert machine_code.amd_resources(notes) == (128, 528)
    assert machine_code.amd_resources(notes.replace(b"\xcd\x02\x10", b"\x00"))[1] == 0
