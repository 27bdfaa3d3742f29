"""The operations of smoke.py under compute-sanitizer, if installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from .step import Deadline, Verdict, lines_of, start

FOUND = 9  # exit status for errors
WORK = [sys.executable, "-m", "gpu.smoke"]
START = 60.0  # seconds to start under the sanitizer, and to end


def find() -> str | None:
    """Find it on PATH, or in the CUDA toolkit of nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    folders = [Path(home) / part for home in homes if home for part in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def check(tool: str, deadline: Deadline) -> Verdict:
    program = find()
    if program is None:
        return Verdict(True, "compute-sanitizer is not installed: nothing was checked")
    # Without it first, which fills the cache of compiled kernels.
    subprocess.run([*WORK, str(deadline.left / 2)], stdout=subprocess.DEVNULL)
    seconds = max(deadline.left - START, START)
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    # Each tensor gets its own allocation; else an access past its end hits the allocator's memory.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = start([*command, *WORK, str(seconds)], env=env)
    return verdict(tool, list(lines_of(process)), process.wait())


def verdict(tool: str, lines: list[str], code: int) -> Verdict:
    """Read the verdict from the output of program and sanitizer."""
    ran, cases = 0, 0
    for line in lines:
        if match := re.match(r"ran (\d+) of (\d+): ", line):
            ran, cases = int(match[1]), int(match[2])
    summary = [line.strip("= ") for line in lines if "SUMMARY:" in line]
    line = f"{ran} of {cases} operations ran; {summary[-1] if summary else f'status {code}'}"
    errors = [line.strip("= ") for line in lines if line.startswith("========= ")][:60]
    if not ran and errors:
        line += f": {errors[0]}"
    ok = code == 0 and 0 < ran == cases
    return Verdict(ok, line, {} if ok else {"tool": tool, "said": errors})


memcheck, racecheck = partial(check, "memcheck"), partial(check, "racecheck")
