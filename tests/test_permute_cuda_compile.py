"""What nvcc makes of the CUDA permutation: no warning, no spill, 16-byte accesses; needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_cuda_compile import ARCHS, compile_strictly, read

WORDS = {"t": 2, "j": 4, "m": 8}  # bytes of uint16_t, uint32_t and uint64_t
KERNEL = re.compile(r"permute_kernelI(\w)Li(\d+)EEEv")
EXPECTED = {(size, vec) for size in WORDS.values() for vec in (1, 16 // size)}


@pytest.fixture(scope="module")
def object_file(tmp_path_factory) -> Path:
    return compile_strictly("permute", tmp_path_factory.mktemp("nvcc"))


def by_kernel(text: str) -> dict[tuple[str, int, int], str]:
    """Text by (architecture, bytes of an element, lanes of an access)."""
    found, key, arch = {}, None, None
    for line in text.splitlines():
        if chip := re.match(r"arch = sm_(\d+)", line):
            arch, key = chip[1], None
        elif "Function" in line:
            kernel = KERNEL.search(line)
            key = (arch, WORDS[kernel[1]], int(kernel[2]))
            found[key] = ""
        elif key:
            found[key] += line + "\n"
    return found


def test_no_spills_and_48_kib_of_loads_in_flight(object_file):
    kernels = by_kernel(read(object_file, "--dump-resource-usage"))
    assert set(kernels) == {(arch, *kernel) for arch in ARCHS for kernel in EXPECTED}
    for key, text in kernels.items():
        used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
        assert (used["STACK"], used["LOCAL"]) == (0, 0), (key, used)
        assert used["REG"] <= 80, (key, used)  # 6 blocks of 128 threads, each with 4 x 16 bytes


def test_vector_kernels_move_16_bytes(object_file):
    for (arch, size, vec), sass in by_kernel(read(object_file, "-sass")).items():
        loads = re.findall(r"\bLDG\.E[.\w]*", sass)
        stores = re.findall(r"\bSTG\.E[.\w]*", sass)
        wide = vec > 1
        # Positions, boundaries and permutations are loaded by element.
        assert sum(".128" in name for name in loads) == 4 * wide, (arch, size, vec, loads)
        assert all((".128" in name) == wide for name in stores), (arch, size, vec, stores)
        assert ("STS.128" in sass) == wide, (arch, size, vec)
