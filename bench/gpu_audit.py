"""What the GPU kernels compile to, on every chip, without a GPU: python bench/gpu_audit.py

Registers, stack, shared memory, occupancy, widths of accesses, products and special functions of
each loop, and the time that bytes and instructions imply on A100, H100 and B200. Nothing runs, so
these times are bounds, not measurements. Ends with status 1 where a kernel has a fault.

A run of all writes bench/results/gpu_audit.json, or what it has come to when it is stopped with
Ctrl-C: the sample that the tests compile comes first. Every row there holds a hash of all that
decides the machine code, so the next run, on any machine, compiles only what is missing or has
changed since; binaries are in build/ besides. `python bench/readme.py` then
puts the table into the README.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

# The decorator picks interpreter or compiler when a kernel's module is imported.
os.environ.pop("TRITON_INTERPRET", None)

from audit import report
from audit.entries import KERNELS, all_cases, sample
from audit.run import run
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULT = Path(__file__).parent / "results" / "gpu_audit.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="only what the tests compile")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one")
    parser.add_argument("--afresh", action="store_true", help="compile what has not changed too")
    parser.add_argument("--known", type=Path, default=RESULT, help="rows that may be known again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help=f"default: {RESULT.name}, if nothing is left out")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    cases = sample() if asked.sample else all_cases()
    cases = [case for case in cases if not asked.kernel or case.kernel in asked.kernel]
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with TemporaryDirectory() as folder, Progress(*columns) as progress:
        os.environ["TRITON_CACHE_DIR"] = folder  # or it would fill the user's own
        bar = progress.add_task("", total=len(cases))
        rows, failed = run(
            cases,
            asked.jobs,
            report.load_known(asked.known),
            lambda case: progress.update(bar, advance=1, description=str(case)),
            asked.afresh,
        )
    if out := asked.out or (None if asked.sample or asked.kernel else RESULT):
        report.save(rows, out, failed)
    return min(report.show(rows, failed), 1)


if __name__ == "__main__":
    sys.exit(main())
