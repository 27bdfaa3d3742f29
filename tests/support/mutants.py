"""Mutants of a room: change its sources at random places, and see whether its tests notice.

    make mutants ROOM=rope COUNT=30

cosmic-ray makes them, in a worktree of the last commit under build/mutants, and each meets the
tests that run its line, by coverage, or else all of the room. A second call goes on where the first
was stopped. Prints the killed share and each survivor. Those in data/mutants.json, which no test
can tell from the code, are left out; write new ones there, with the reason. Python and Triton
(interpreted, launchers too); C++ has none here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult
from coverage import CoverageData

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutants"
TREE = FOLDER / "tree"
EQUIVALENT = Path(__file__).parent / "data" / "mutants.json"
# A room's sources, and its tests where they have another name.
ROOMS = {
    "scores": ("scores", ["scores", "attention/test_attention.py"]),
    "methods": ("methods", ["methods"]),
    "positions": ("positions", ["positions"]),
    "rope": ("ops/rope", ["rope"]),
    "attention": ("ops/attention", ["attention"]),
    "permuteformer": ("ops/permuteformer", ["permuteformer"]),
    "distributed": ("distributed", ["distributed"]),
    "transformers": ("integrations/transformers", ["transformers"]),
    "vllm": ("integrations/vllm", ["vllm"]),
    "evaluation": ("evaluation", ["evaluation"]),
}
# Operators whose mutants say little: types in annotations, any operation by any other.
DULL = (
    r"BitOr|BitAnd|BitXor|Shift|Pow|Variable|Exception|Decorator|_Is|Invert"
    r"|Comparison.*_(Eq|NotEq)$"
)
CONFIG = """
[cosmic-ray]
module-path = "{sources}"
timeout = 600.0
excluded-modules = []
test-command = "{python} {script} {room} --meet"
[cosmic-ray.distributor]
name = "local"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("count", type=int, nargs="?")
    parser.add_argument("--meet", action="store_true", help="run the tests of the mutant in place")
    args = parser.parse_args()
    if args.meet:
        sys.exit(meet(args.room))
    if not TREE.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", "--force", str(TREE), "HEAD")
    folder, _ = ROOMS[args.room]
    session, config = (FOLDER / f"{args.room}.{end}" for end in ("sqlite", "toml"))
    sources = f"extrope_kernels/{folder}"
    names = {"sources": sources, "room": args.room}
    config.write_text(CONFIG.format(python=sys.executable, script=__file__, **names))
    # The tree comes before the checkout that is installed.
    path = os.pathsep.join((str(TREE), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path}
    environment |= {"COVERAGE_FILE": str(FOLDER / f"{args.room}.coverage")}
    run = {"cwd": TREE, "env": environment, "check": True}
    command = [sys.executable, "-m", "cosmic_ray.cli"]
    if not session.exists():
        measured = ["--cov", sources, "--cov-context", "test", "--cov-report", ""]
        whole = [sys.executable, "-m", "pytest", "-q", "-n", "2", *measured, *tests_of(args.room)]
        subprocess.run(whole, **run)  # all pass
        subprocess.run([*command, "init", str(config), str(session)], **run)
    with use_db(str(session), WorkDB.Mode.open) as database:
        sample(database, args.count)
    subprocess.run([*command, "exec", str(config), str(session)], **run)
    with use_db(str(session), WorkDB.Mode.open) as database:
        report(database, args.room)


def tests_of(room: str) -> list[str]:
    return [f"tests/{name}" for name in ROOMS[room][1]]


def meet(room: str) -> int:
    """Run the tests that the changed line's coverage names, until one fails."""
    diff = ["git", "diff", "--unified=0", "--", "extrope_kernels"]
    change = subprocess.run(diff, cwd=TREE, capture_output=True, text=True, check=True).stdout
    path, line = re.search(r"^--- a/(.*?)$.*?^@@ -(\d+)", change, re.M | re.S).groups()
    data = CoverageData(os.environ["COVERAGE_FILE"])
    data.read()
    contexts = data.contexts_by_lineno(str(TREE / path)).get(int(line), [])
    chosen = sorted({context.split("|")[0] for context in contexts} - {""})
    random.Random(0).shuffle(chosen)  # neighbours of a grid fail together
    listed = FOLDER / "chosen.txt"
    listed.write_text("\n".join(chosen or tests_of(room)))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"@{listed}"]
    return subprocess.run(command, cwd=TREE, check=False).returncode


def git(*command: str) -> None:
    subprocess.run(["git", *command], cwd=ROOT, check=True)


def key(mutation: MutationSpec) -> str:
    """Name a mutant by its line's text, which stays as lines move."""
    line, column = mutation.start_pos
    text = (TREE / mutation.module_path).read_text().splitlines()[line - 1].strip()
    operator = mutation.operator_name.removeprefix("core/")
    return f"{mutation.module_path}: {text} [{operator} {column}]"


def sample(database: WorkDB, count: int) -> None:
    """Skip all mutants but `count` of them, the same ones in every call; fewer stay a part."""
    known = json.loads(EQUIVALENT.read_text())
    items = {item.job_id: item.mutations[0] for item in database.work_items}
    telling = [
        job
        for job, mutation in items.items()
        if not re.search(DULL, mutation.operator_name) and key(mutation) not in known
    ]
    telling.sort(key=lambda job: key(items[job]))
    chosen = set(random.Random(0).sample(telling, len(telling))[:count])
    done = {job: result for job, result in database.results}
    left = [job for job in items if job not in chosen and job not in done]
    database.set_multiple_results(left, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    for job in chosen & done.keys():  # skipped by a call with a smaller count
        if done[job].worker_outcome is WorkerOutcome.SKIPPED:
            sys.exit(f"remove {FOLDER} to take more mutants than before")


def report(database: WorkDB, room: str) -> None:
    items = {item.job_id: item.mutations[0] for item in database.work_items}
    ran = [
        (items[job], result)
        for job, result in database.results
        if result.worker_outcome is not WorkerOutcome.SKIPPED
    ]
    survivors = [m for m, result in ran if result.test_outcome is TestOutcome.SURVIVED]
    print(f"{room}: {len(ran) - len(survivors)} of {len(ran)} mutants killed")
    for mutation in survivors:
        print(f"  survived: line {mutation.start_pos[0]} of {key(mutation)}")


if __name__ == "__main__":
    main()
