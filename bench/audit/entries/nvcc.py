"""Compile a CUDA C++ source for every chip at once, and read what each kernel of it needs."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from extrope_kernels import _build

from ..case import Binary, Case
from .triton_compiler import TOOLS

STRICT = ("-Werror=all-warnings", "-Xptxas=-warn-spills")


@dataclass(frozen=True)
class Function:
    """One kernel of csrc/cuda/`source`, such as rope/rope.cu, on one chip."""

    source: str
    warps: int
    case: Case
    case_of: Callable[[int, str], Case]  # from chip and mangled name
    every: Callable[[], Sequence[Case]]  # of the source

    @property
    def chips(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(case.capability for case in self.every()))

    def made_from(self, capability: int) -> str:
        return _hash(self.source, self.chips)

    def compile(self, capability: int) -> Binary:
        """BuildError where there is no nvcc."""
        found = _compile(self.source, self.case_of, self.chips)
        if wrong := set(self.every()) ^ set(found):
            names = ", ".join(map(str, wrong))
            raise LookupError(f"cases and kernels of {self.source} differ: {names}")
        return replace(found[self.case], warps=self.warps)


def _path(source: str) -> Path:
    return _build.source_dir() / "cuda" / source


def _flags(chips: Sequence[int]) -> list[str]:
    return [*_build.NVCC_FLAGS, *STRICT, _build.gencode([str(chip) for chip in chips])]


@lru_cache
def _hash(source: str, chips: tuple[int, ...]) -> str:
    """Of the source with all that it includes of ours, the flags and the compiler."""
    digest = hashlib.sha256(" ".join(_flags(chips)).encode())
    digest.update(_run([_build.find_nvcc(), "--version"]).encode())
    for path in sorted(included(_path(source).resolve(), set())):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def included(path: Path, found: set[Path]) -> set[Path]:
    found.add(path)
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
        if (include := (_build.source_dir() / name).resolve()) not in found:
            included(include, found)
    return found


@lru_cache
def _compile(
    source: str, case_of: Callable[[int, str], Case], chips: tuple[int, ...]
) -> dict[Case, Binary]:
    """All kernels of the source, with no warning and no spill."""
    with TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.o"
        _run(
            [
                _build.find_nvcc(),
                *_flags(chips),
                *_build.include(),
                "-c",
                str(_path(source)),
                "-o",
                str(target),
            ]
        )
        usage = _sections(target, "--dump-resource-usage")
        sass = _sections(target, "-sass")
    found = {}
    for (chip, symbol), text in usage.items():
        used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
        numbers = (used[name] for name in ("REG", "STACK", "LOCAL", "SHARED"))
        found[case_of(chip, symbol)] = Binary(*numbers, 0, sass[chip, symbol])
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
