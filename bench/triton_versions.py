"""Every Triton that is claimed compiles every kernel: python bench/triton_versions.py

Each is installed aside, into build/triton-VERSION, and compiles the audit's sample for every chip,
or with --all every configuration (an hour and a half of one processor each). No GPU is needed, and
none is asked. bench/results/triton_versions.json tells what holds stack; ends with status 1 where a
kernel does not compile, or holds more than 16 bytes, or than a tile that was measured may. As in
gpu_audit.py, rows hold a hash of all that decides the machine code
(bench/results/triton/VERSION.json), and what has not changed since is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from audit import report
from audit.entries import KERNELS, all_cases
from audit.measured import allowed_stack

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "triton_versions.json"
CLAIMED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
MOST_STACK = 16  # bytes of a thread, where a plain kernel of the tile holds none


def folder_of(version: str) -> Path:
    """Where this Triton lies, installed if need be."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(folder), f"triton=={version}"], check=True)
    return folder


def rows_of(version: str) -> Path:
    """The rows of the sample, as they were compiled with this Triton."""
    return RESULT.parent / "triton" / f"{version}.json"


def compile_with(version: str, every: bool, keep: bool = False) -> dict:
    """What became of the cases: how many there are, what failed, and who holds how much stack.

    keep: write the rows of the sample, to be known again.
    """
    kernels = [name for name in KERNELS if not name.endswith("cuda")]
    path = os.pathsep.join([str(folder_of(version)), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with TemporaryDirectory() as temporary:
        out = Path(temporary) / "rows.json"
        command = [sys.executable, str(ROOT / "bench" / "gpu_audit.py"), "--out", str(out)]
        command += [word for name in kernels for word in ("--kernel", name)]
        command += [] if every else ["--sample"]
        command += ["--known", str(rows_of(version))]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        if not out.exists():
            raise RuntimeError(f"Triton {version}: {done.stdout[-2000:]}")
        content, rows = json.loads(out.read_text()), report.load(out)
        if keep and not every:
            rows_of(version).parent.mkdir(exist_ok=True)
            shutil.copy(out, rows_of(version))
    if content["triton"] != version:
        raise RuntimeError(f"asked for Triton {version}, compiled with {content['triton']}")
    stack = {str(case): row.stack for case, row in sorted(rows.items(), key=lambda x: str(x[0]))}
    return {
        "configurations": len(rows) + len(content["failed"]),
        "failed": content["failed"],
        "stack": {case: size for case, size in stack.items() if size and "plain" not in case},
    }


def too_much(stack: dict[str, int]) -> list[str]:
    """The cases that hold more than they may."""
    most = {str(case): max(MOST_STACK, allowed_stack(case)) for case in all_cases()}
    return [case for case, size in stack.items() if size > most[case]]


def table(path: Path = RESULT) -> str:
    """Markdown: a line for each Triton, and every configuration that holds stack."""
    lines = ["| Triton | configurations | compile | hold stack |", "| --- | --- | --- | --- |"]
    for version, found in json.loads(path.read_text()).items():
        held = ", ".join(f"{case}: {size} B" for case, size in found["stack"].items()) or "none"
        compiled = found["configurations"] - len(found["failed"])
        lines.append(f"| {version} | {found['configurations']} | {compiled} | {held} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=CLAIMED, help="default: all that is claimed")
    parser.add_argument("--all", action="store_true", help="every configuration, not the sample")
    asked = parser.parse_args()
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for version in asked.versions:
        known[version] = compile_with(version, asked.all, keep=True)
        RESULT.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    print(table())
    found = [known[version] for version in asked.versions]
    return int(any(one["failed"] or too_much(one["stack"]) for one in found))


if __name__ == "__main__":
    sys.exit(main())
