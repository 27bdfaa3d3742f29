"""Compile a CUDA C++ source for every chip at once, and read what each kernel of it needs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from extrope_kernels import _build

from ..case import Binary
from .triton_compiler import TOOLS

STRICT = ("-Werror=all-warnings", "-Xptxas=-warn-spills")


def compile_all(source: str, chips: Sequence[int], warps: int) -> dict[tuple[int, str], Binary]:
    """The kernels of csrc/cuda/`source` by chip and mangled name, with no warning and no spill.

    BuildError where there is no nvcc.
    """
    path = _build.source_dir() / "cuda" / source
    flags = [*_build.NVCC_FLAGS, *STRICT, _build.gencode([str(chip) for chip in chips])]
    with TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.o"
        _run([_build.find_nvcc(), *flags, "-c", str(path), "-o", str(target)])
        usage = _sections(target, "--dump-resource-usage")
        sass = _sections(target, "-sass")
    found = {}
    for key, text in usage.items():
        used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
        found[key] = Binary(
            *(used[name] for name in ("REG", "STACK", "LOCAL", "SHARED")), warps, sass[key]
        )
    return found


def _sections(target: Path, option: str) -> dict[tuple[int, str], str]:
    """cuobjdump's text on every chip and kernel."""
    sections: dict[tuple[int, str], list[str]] = {}
    chip, lines = 0, []
    for line in _run([str(TOOLS / "cuobjdump"), option, str(target)]).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            chip, lines = int(found[1]), []
        elif found := re.search(r"Function\s*:?\s*(\w+)", line):
            lines = sections.setdefault((chip, found[1]), [])
        else:
            lines.append(line)
    return {key: "\n".join(lines) for key, lines in sections.items()}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise _build.BuildError(f"{Path(command[0]).name} failed: {done.stdout}{done.stderr}")
    return done.stdout
