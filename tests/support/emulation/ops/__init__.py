"""CUDA ops of csrc/cuda, bindings and all, compiled for the host and called on tensors of the CPU.

The other modules of emulation run kernels alone, without torch; here the whole op runs, in a
process with a sanitizer's runtime, and what is checked of its arguments is checked too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from extrope_kernels import _build

from ..harness import ADDRESS, THREAD, MissingTool, Sanitizer, SanitizerError, find_cuda_headers

HERE = Path(__file__).parent
SUPPORT = HERE.parents[1]
SOURCES = (
    "append/append.cu",
    "append/bind.cpp",
    "rope/norm.cu",
    "rope/norm_backward.cu",
    "rope/norm_bind.cpp",
)
OPTIMIZATION = {ADDRESS.name: "-O0", THREAD.name: "-O1"}


def build(folder: Path) -> None:
    """Compile one library per sanitizer under `folder`; MissingTool when something is not there."""
    try:
        compiler, torch = _build.find_compiler(), _build.find_torch()
    except _build.BuildError as error:
        raise MissingTool(str(error)) from error
    # Our cuda/launch.h and cuda/stream.h are found before those of the sources.
    headers = ["-I", str(HERE), *_build.include()]
    system = ["-isystem", str(find_cuda_headers()), "-isystem", str(torch / "include")]
    common = [*compiler, _build.STANDARD, "-g1", "-fPIC", "-fvisibility=hidden", "-c", "-Wall"]
    warnings = ["-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    compile_it = [*common, *warnings, *headers, *system, _build.TORCH_TARGET]
    jobs = {}  # of an object file
    for source in [_build.source_dir() / "cuda" / name for name in SOURCES]:
        for s in (ADDRESS, THREAD) if source.suffix == ".cu" else (None,):
            stem = f"{source.parent.name}.{source.name}"
            name = stem if s is None else f"{stem}.{s.name}"
            # What takes longest under a sanitizer is the compiler; bindings go without one.
            flags = ["-O0"] if s is None else [*s.flags, OPTIMIZATION[s.name], "-xc++"]
            jobs[folder / f"{name}.o"] = [*compile_it, *flags, str(source)]
    jobs[folder / "register.o"] = [*compile_it, "-O0", str(HERE / "register.cpp")]
    compiling = [
        subprocess.Popen([*job, "-o", str(target)], stderr=subprocess.PIPE, text=True)
        for target, job in jobs.items()
    ]
    for process in compiling:
        report = process.communicate()[1]
        assert process.returncode == 0, report
    for s in (ADDRESS, THREAD):
        other = (THREAD if s is ADDRESS else ADDRESS).name
        objects = [str(target) for target in jobs if f".{other}." not in target.name]
        link = [*compiler, "-shared", *s.flags, *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"]
        subprocess.run([*link, "-o", str(library(folder, s))], check=True)


def library(folder: Path, sanitizer: Sanitizer) -> Path:
    return folder / f"emulated_{sanitizer.name}.so"


def run(folder: Path, sanitizer: Sanitizer, cases: str) -> dict[str, str]:
    """The cases "module:function" in a process of their own: what failed, by name."""
    runtimes = [
        _build.output([*_build.find_compiler(), f"-print-file-name={name}"]).strip()
        for name in (sanitizer.runtime, "libstdc++.so.6")
    ]
    paths = [str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **sanitizer.environment,
        "LD_PRELOAD": ":".join(runtimes),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "runner.py"), str(library(folder, sanitizer)), cases],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        raise SanitizerError(done.stderr[-6000:])
    return json.loads(done.stdout.splitlines()[-1])
