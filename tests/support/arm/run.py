"""The CPU kernels for ARM against those for x86: `nox -s arm`.

A driver, the other files of this folder, calls every kernel on fixed inputs and writes down what it
returns. It is compiled thrice, with the commands of `_build.py` and without torch: for ARM, to run
under qemu on a processor that has no more than ARMv8.0; for x86 with vectors as long, the baseline;
and for that with fused multiply-add, which ARM has and the baseline has not. Results that only move
values are the same bits. Of others, ARM may be off the baseline by twice as much as contraction to
fused multiply-adds takes x86 off it, the largest difference in a tensor, and by one rounding to
the type of the result.
"""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# As setup.py does: the package itself needs torch.
package = types.ModuleType("extrope_kernels")
package.__path__ = [str(ROOT / "extrope_kernels")]
sys.modules.setdefault(package.__name__, package)

from extrope_kernels import _build  # noqa: E402

CROSS = "aarch64-linux-gnu-g++"
QEMU = ("qemu-aarch64", "-cpu", "cortex-a57")
# As ARM does, sums too: by itself GCC leaves those of short vectors as they are, which for some
# processors is faster.
FUSED = ("-mfma", "-mtune=haswell")
# What kernels call, and what chooses them; the rest of the library is made of torch's tensors.
BESIDE_KERNELS = (
    "cpu.attention.wait_for_keys.o",
    "cpu.runtime.capability.o",
    "cpu.runtime.kept_pages.o",
)
NEON = 5  # in extrope_kernels.cli.CPU_CAPABILITIES
# Of each type: bits behind the leading one, and the smallest value, to base 2.
ROUNDING = {
    "float64": (52, -1074),
    "float32": (23, -149),
    "float16": (10, -24),
    "bfloat16": (7, -133),
}

Results = Mapping[str, tuple[str, np.ndarray]]


def main() -> int:
    if missing := [name for name in (CROSS, QEMU[0]) if not shutil.which(name)]:
        print(f"{missing[0]} not found: apt-get install g++-aarch64-linux-gnu qemu-user")
        return 1
    folder = ROOT / "build" / "arm"
    host = _build.find_compiler()
    x86, _ = run(build(host, "baseline", folder / "x86"))
    fused, _ = run(build([*host, *FUSED], "neon", folder / "x86_fused"))
    libc = Path(_build.output([CROSS, "-print-file-name=libc.so.6"]).strip())
    sysroot = str(libc.resolve().parents[1])
    (isa,) = _build.instruction_sets([CROSS])
    arm, capability = run(build([CROSS], isa, folder / "arm"), *QEMU, "-L", sysroot)
    if capability != NEON:
        print(f"extrope::cpu_capability() is {capability} on ARM, expected {NEON}")
        return 1
    return compare(arm, x86, fused)


def build(compiler: list[str], isa: str, folder: Path) -> Path:
    """The driver with the kernels for one instruction set."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "csrc").exists():
        (folder / "csrc").symlink_to(_build.source_dir())
    objects = {
        name: command
        for name, command in _build.cpu_objects(compiler, [isa], torch_flags=[]).items()
        if name.endswith(f"_kernel.{isa}.o") or name in BESIDE_KERNELS
    }
    flags = [_build.STANDARD, *_build.CXX_FLAGS, _build.BINDING, *_build.ISA_FLAGS[isa]]
    where = ["-I", "csrc", "-I", str(HERE), f"-DEXTROPE_ISA={isa}"]
    for source in sorted(HERE.glob("*.cpp")):
        objects[f"driver.{source.stem}.o"] = [*compiler, *flags, *where, "-c", str(source)]
    link, log = [*compiler, "-pthread"], folder / "build.log"
    _build.run_ninja(objects, "driver", link, folder, log)
    return folder / "driver"


def run(driver: Path, *emulator: str) -> tuple[Results, int]:
    """What the kernels returned, by name, and the capability that the library would choose."""
    results = driver.parent / "results"
    printed = _build.output([*emulator, str(driver), str(results)])
    return read(results), int(printed)


def read(path: Path) -> Results:
    """Name, type and values of each result; those of floats in float64."""
    found = {}
    with path.open("rb") as file:
        while header := file.readline().split():
            name, kind, count = header[0].decode(), header[1].decode(), int(header[2])
            stored = np.dtype("uint16" if kind == "bfloat16" else kind)
            values = np.frombuffer(file.read(count * stored.itemsize), stored)
            if kind == "bfloat16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            found[name] = (kind, values if kind.startswith("uint") else values.astype(np.float64))
    return found


def compare(arm: Results, x86: Results, fused: Results) -> int:
    """Print a line per operation and one per result that is off; 1 if there is one."""
    wrong, lines = [], {}
    for name, (kind, expected) in x86.items():
        values = arm[name][1]
        if kind.startswith("uint"):
            off = 0.0 if np.array_equal(values, expected) else np.inf
        else:
            off = share_of_tolerance(values, expected, fused[name][1], *ROUNDING[kind])
        line = lines.setdefault(name.split("/")[0], [0, 0, 0, 0.0])
        line[0] += 1
        line[1] += len(values)
        line[2] += int(np.sum((values == expected) | (values != values)))
        line[3] = max(line[3], off)
        if off > 1:
            wrong.append(f"{name} is off by {off:.3g} times what is allowed")
    for operation, (results, values, same, off) in lines.items():
        print(
            f"{operation}: {results} results, {values} values, {same / values:.1%} the same bits, "
            f"the worst at {off:.2f} of what is allowed"
        )
    print("\n".join(wrong) or "ARM agrees with x86")
    return int(bool(wrong))


def share_of_tolerance(
    values: np.ndarray, expected: np.ndarray, fused: np.ndarray, bits: int, smallest: int
) -> float:
    """The largest difference, in units of what is allowed where it is."""
    finite = np.isfinite(expected)
    if not np.array_equal(values[~finite], expected[~finite], equal_nan=True):
        return np.inf
    values, expected, fused = values[finite], expected[finite], fused[finite]
    contraction = np.max(np.abs(fused - expected), initial=0.0)
    rounding = np.ldexp(1.0, np.maximum(np.frexp(expected)[1] - 1 - bits, smallest))
    return float(np.max(np.abs(values - expected) / (2 * contraction + rounding), initial=0.0))


if __name__ == "__main__":
    raise SystemExit(main())
