"""Building, packaging and loading the compiled libraries in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from extrope_kernels import _build, _ext

ROOT = Path(__file__).resolve().parents[2]
CPU = _build.LIBRARIES["cpu"]
# Whatever it is asked to compile, it writes one line and fails.
BROKEN = """#!/bin/sh
case "$*" in --version) echo broken 1.0; exit 0 ;; *" -E "*) exit 0 ;; esac
[ "$1" = -dumpmachine ] && echo x86_64-linux-gnu && exit 0
echo '{line}'
exit 1
"""
LOAD = "from extrope_kernels import _ext; print(_ext.load('cpu')); print(_ext._paths.get('cpu'))"
# Torch's C shim, the versioned symbols of libc, libstdc++ and libgcc, and weak ones.
ALLOWED = re.compile(r"U (aoti_torch_|torch_)\w+$|U \S+@(GLIBC|GLIBCXX|CXXABI|GCC)_|[wv] ")


def has(find: Callable[[], object]) -> bool:
    try:
        find()
    except _build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has(_build.find_compiler), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not has(_build.find_nvcc), reason="no nvcc")


def broken(folder: Path, line: str) -> str:
    """The path of a compiler, written into the folder, that fails with a line of its own."""
    path = folder / "broken"
    path.write_text(BROKEN.format(line=line))
    path.chmod(0o755)
    return str(path)


def start(code: str, **env: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def load(**env: str) -> tuple[str, str]:
    """The reason and the path that a fresh process gets from `load("cpu")`, "None" for none."""
    process = start(LOAD, **env)
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    reason, path = out.splitlines()
    return reason, path


def nm(library: Path, *options: str) -> list[str]:
    done = subprocess.run(["nm", *options, str(library)], capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines()]


def foreign_symbols(library: Path) -> list[str]:
    """What a library needs beyond torch's C shim and the C and C++ libraries."""
    undefined = nm(library, "-D", "--undefined-only")
    return [line for line in undefined if not ALLOWED.match(line)]


def copy_checkout(folder: Path) -> None:
    """What a wheel is made from: builds write into their source folder."""
    names = ("setup.py", "extrope_cli.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
    for name in names:
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "extrope_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def copy_compiled(work_dir: Path) -> None:
    """What the build on first use has compiled, if anything: of the same commands ninja runs none
    again.
    """
    compiled = _ext.cache_dirs()[0] / f"build-cpu-{_build.work_key('cpu')}"
    if compiled.exists():
        shutil.copytree(compiled, work_dir)


def compile_times(work_dir: Path) -> dict[str, int]:
    """When each object was compiled."""
    return {path.name: path.stat().st_mtime_ns for path in work_dir.glob("*.o")}
