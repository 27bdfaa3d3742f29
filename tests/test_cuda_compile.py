"""What nvcc makes of the CUDA rotation: no warning, no spill, 16-byte accesses. No GPU needed."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from extrope_kernels import _build

ARCHS = ("80", "86", "89", "90", "100", "120")
BLOCK = 128
WARP = 32
REGISTERS = 65536  # of one processor, in all of ARCHS, given to a warp 256 at a time
TYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
KERNEL = re.compile(r"rope_kernelI(\w+?)Li(\d+)ELb(\d)ELb(\d)ELb(\d)EEEv")
VECTOR = {"float32": 4, "bfloat16": 8, "float16": 8}
BOOLS = (False, True)
# (dtype, lanes per access, interleaved, with the angle gradient, positions by axis)
EXPECTED = {(dtype, 1, False, True, axes) for dtype in TYPES.values() for axes in BOOLS} | {
    (dtype, vec, *kind)
    for dtype, vec in VECTOR.items()
    for kind in itertools.product(BOOLS, BOOLS, BOOLS)
}
Kernel = tuple[str, int, bool, bool, bool]


def cuobjdump() -> str | None:
    """The toolkit's disassembler, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    if triton := importlib.util.find_spec("triton"):
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return str(bundled) if bundled.is_file() else None
    return None


def compile_strictly(name: str, folder: Path) -> Path:
    """The object file of csrc/cuda/NAME.cu for all ARCHS; a warning or a spill is an error."""
    try:
        nvcc = _build.find_nvcc()
    except _build.BuildError as reason:
        pytest.skip(str(reason))
    output = folder / f"{name}.o"
    strict = ["-Werror=all-warnings", "-Xptxas=-warn-spills"]
    source = str(_build.source_dir() / "cuda" / f"{name}.cu")
    done = subprocess.run(
        [nvcc, *_build.NVCC_FLAGS, *strict, _build.gencode(ARCHS), "-c", source, "-o", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def object_file(tmp_path_factory) -> Path:
    return compile_strictly("rope", tmp_path_factory.mktemp("nvcc"))


def read(object_file: Path, option: str) -> str:
    """cuobjdump's text."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: neither a full CUDA toolkit nor triton is installed")
    return subprocess.run(
        [tool, option, str(object_file)], capture_output=True, text=True, check=True
    ).stdout


def dump(object_file: Path, option: str) -> dict[tuple[str, Kernel], str]:
    """cuobjdump's text on every (architecture, kernel)."""
    text = read(object_file, option)
    sections = defaultdict(str)
    arch = kernel = None
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch, kernel = found[1], None
        elif "Function" in line:
            found = KERNEL.search(line)
            assert found, line
            kernel = (TYPES[found[1]], int(found[2]), *(found[i] == "1" for i in (3, 4, 5)))
        elif kernel:
            sections[arch, kernel] += line + "\n"
    return sections


def resident_threads(registers: int) -> int:
    """How many threads of a kernel one processor holds, in blocks of BLOCK, by their registers."""
    per_warp = -(-registers * WARP // 256) * 256
    return REGISTERS // per_warp // (BLOCK // WARP) * BLOCK


@pytest.fixture(scope="module")
def resources(object_file) -> dict[tuple[str, Kernel], dict[str, int]]:
    return {
        key: {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
        for key, text in dump(object_file, "--dump-resource-usage").items()
    }


def test_no_kernel_is_missing(resources):
    assert set(resources) == {(arch, kernel) for arch in ARCHS for kernel in EXPECTED}


def test_no_spills_and_no_local_arrays(resources):
    for key, used in resources.items():
        assert (used["STACK"], used["LOCAL"], used["SHARED"]) == (0, 0, 0), (key, used)


def test_occupancy(resources):
    """A processor holds loads enough in flight to hide the memory's latency: 48 KiB at least."""
    table = []
    for (arch, kernel), used in sorted(resources.items(), key=str):
        _, vec, _, gradient, _ = kernel
        threads = resident_threads(used["REG"])
        table.append(f"sm_{arch:4} {kernel}: {used['REG']} registers, {threads} threads")
        if vec > 1:
            heads, tensors = (2, 2) if gradient else (4, 1)
            assert threads * heads * tensors * 2 * 16 >= 48 * 1024, table[-1]
    print("\n".join(table))


def test_vector_kernels_move_16_bytes(object_file):
    for (arch, kernel), sass in dump(object_file, "-sass").items():
        _, vec, _, gradient, _ = kernel
        if vec == 1:
            continue
        loads = re.findall(r"\bLDG\.E[.\w]*", sass)
        stores = re.findall(r"\bSTG\.E[.\w]*", sass)
        heads, vectors = (2, 4) if gradient else (4, 2)
        assert sum(".128" in name for name in loads) >= heads * vectors, (arch, kernel, loads)
        # Only the angle gradient, where there is one, is stored by element.
        assert sum(".128" in name for name in stores) >= heads * 2, (arch, kernel, stores)
        assert gradient or all(".128" in name for name in stores), (arch, kernel, stores)
