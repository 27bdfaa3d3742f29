"""Mutants of a room: change its sources at random places, and see whether its tests notice.

    make mutants ROOM=rope COUNT=30
    make mutants ROOM=changed COUNT=40 SINCE=HEAD~5
    make mutants ROOM=csrc COUNT=20

cosmic-ray makes them, in a worktree of the last commit under build/mutants, and each meets the
tests that run its line, by coverage, or else all of the room. "changed" takes as many of each room
whose lines changed since a commit, and "csrc" those of mutants_cpp.py. A second call goes on where
the first was stopped. Prints the killed share and each survivor. Those in data/mutants.json, which
no test can tell from the code, are left out; write new ones there, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult
from coverage import CoverageData
from support import mutants_cpp

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).parent / "data" / "mutants.json"
# A room's sources, and its tests where they have another name.
ROOMS = {
    "scores": ("scores", ["scores", "attention/test_attention.py"]),
    "methods": ("methods", ["methods"]),
    "positions": ("positions", ["positions"]),
    "rope": ("ops/rope", ["rope"]),
    "cache": ("ops/cache", ["cache"]),
    "attention": ("ops/attention", ["attention", "decode"]),
    "decode": ("ops/decode", ["decode"]),
    "permuteformer": ("ops/permuteformer", ["permuteformer"]),
    "distributed": ("distributed", ["distributed"]),
    "transformers": ("integrations/transformers", ["transformers"]),
    "vllm": ("integrations/vllm", ["vllm"]),
    "evaluation": ("evaluation", ["evaluation"]),
}
# Operators whose mutants say little: types in annotations, any operation by any other, a check of
# lists that are equally long.
DULL = (
    r"\[\w*(BitOr|BitAnd|BitXor|Shift|Pow|Variable|Exception|Decorator|_Is|Invert)\w* \d+\]$"
    r"|\[\w*Comparison\w*_(Eq|NotEq) \d+\]$|strict=True.*\[ReplaceTrueWithFalse"
)
CONFIG = """
[cosmic-ray]
module-path = "{sources}"
timeout = 600.0
excluded-modules = []
test-command = "{python} -m support.mutants {room} --meet"
[cosmic-ray.distributor]
name = "local"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("room", choices=[*ROOMS, "changed", "csrc"])
    parser.add_argument("count", type=int, nargs="?", default=40)
    parser.add_argument("--since", help="the commit before the changes", default="HEAD~1")
    parser.add_argument("--meet", action="store_true", help="run the tests of the mutant in place")
    args = parser.parse_args()
    if args.meet:
        sys.exit(meet(args.room))
    folder = ROOT / "build" / "mutants" / git("rev-parse", "--short", "HEAD").strip()
    tree = folder / "tree"
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", "--force", str(tree), "HEAD")
    git("checkout", "--", ".", cwd=tree)  # a run that was killed leaves its mutant
    known = set(json.loads(EQUIVALENT.read_text()))
    if args.room == "csrc":
        mutants_cpp.run(folder, known, args.count)
    elif args.room != "changed":
        run(folder, args.room, known, args.count)
    else:
        lines = changed(args.since)
        rooms = [room for room in ROOMS if any(in_room(path, room) for path, _ in lines)]
        if not rooms:
            print(f"no room's line changed since {args.since}")
        for room in rooms:
            run(folder, room, known, -(-args.count // len(rooms)), lines)


def changed(since: str) -> set[tuple[str, int]]:
    """The file and number of each line that changed since a commit."""
    path, lines = "", set()
    for line in git("diff", "--unified=0", since, "HEAD", "--", "extrope_kernels").splitlines():
        path = line[6:] if line.startswith("+++ ") else path
        if hunk := re.match(r"@@ .* \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(hunk[1]), int(hunk[2] or 1)
            lines |= {(path, number) for number in range(first, first + count)}
    return lines


def in_room(path: str, room: str) -> bool:
    return path.startswith(f"extrope_kernels/{ROOMS[room][0]}/") and path.endswith(".py")


def run(
    folder: Path, room: str, known: set[str], count: int, lines: Set[tuple[str, int]] = frozenset()
) -> None:
    """Let `count` mutants of a room, of `lines` if there are any, meet their tests."""
    tree = folder / "tree"
    name = f"{room}_{'changed' if lines else ''}{count}"
    session, config = (folder / f"{name}.{end}" for end in ("sqlite", "toml"))
    sources = f"extrope_kernels/{ROOMS[room][0]}"
    config.write_text(CONFIG.format(python=sys.executable, sources=sources, room=room))
    # The tree comes before the checkout that is installed.
    path = os.pathsep.join((str(tree), str(tree / "tests"), os.environ.get("PYTHONPATH", "")))
    coverage = folder / f"{room}.coverage"
    environment = {**os.environ, "PYTHONPATH": path, "COVERAGE_FILE": str(coverage)}
    inside = {"cwd": tree, "env": environment, "check": True}
    command = [sys.executable, "-m", "cosmic_ray.cli"]
    if not session.exists():
        subprocess.run([*command, "init", str(config), str(session)], **inside)
    with use_db(str(session), WorkDB.Mode.open) as database:
        sample(database, tree, known, count, lines)
        left = any(database.pending_work_items)
    if left and not coverage.exists():
        measured = ["--cov", sources, "--cov-context", "test", "--cov-report", ""]
        whole = [sys.executable, "-m", "pytest", "-q", "-n", "2", *measured, *tests_of(room)]
        subprocess.run(whole, **inside)  # all pass
    subprocess.run([*command, "exec", str(config), str(session)], **inside)
    with use_db(str(session), WorkDB.Mode.open) as database:
        report(database, tree, room)


def tests_of(room: str) -> list[str]:
    return [f"tests/{name}" for name in ROOMS[room][1]]


def meet(room: str) -> int:
    """Run the tests that the changed line's coverage names, until one fails."""
    diff = git("diff", "--unified=0", "--", "extrope_kernels", cwd=Path.cwd())
    path, line = re.search(r"^--- a/(.*?)$.*?^@@ -(\d+)", diff, re.M | re.S).groups()
    coverage = Path(os.environ["COVERAGE_FILE"])
    data = CoverageData(coverage)
    data.read()
    contexts = data.contexts_by_lineno(str(Path.cwd() / path)).get(int(line), [])
    chosen = sorted({context.split("|")[0] for context in contexts} - {""})
    random.Random(0).shuffle(chosen)  # neighbours of a grid fail together
    listed = coverage.with_suffix(".chosen")
    listed.write_text("\n".join(chosen or tests_of(room)))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"@{listed}"]
    return subprocess.run(command, check=False).returncode


def git(*command: str, cwd: Path = ROOT) -> str:
    return subprocess.run(
        ["git", *command], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


def key(tree: Path, mutation: MutationSpec) -> str:
    """Name a mutant by its line's text, which stays as lines move."""
    line, column = mutation.start_pos
    text = (tree / mutation.module_path).read_text().splitlines()[line - 1].strip()
    operator = mutation.operator_name.removeprefix("core/")
    return f"{mutation.module_path}: {text} [{operator} {column}]"


def sample(
    database: WorkDB, tree: Path, known: set[str], count: int, lines: Set[tuple[str, int]]
) -> None:
    """Skip all mutants but `count` of them, the same ones for the same sources."""
    keys = {item.job_id: key(tree, item.mutations[0]) for item in database.work_items}

    def tells(mutation: MutationSpec, name: str) -> bool:
        place = (str(mutation.module_path), mutation.start_pos[0])
        return name not in known and not re.search(DULL, name) and (not lines or place in lines)

    telling = [
        item.job_id for item in database.work_items if tells(item.mutations[0], keys[item.job_id])
    ]
    telling.sort(key=lambda job: keys[job])
    chosen = set(random.Random(0).sample(telling, len(telling))[:count])
    done = {job for job, _ in database.results}
    left = [job for job in keys if job not in chosen | done]
    database.set_multiple_results(left, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def report(database: WorkDB, tree: Path, room: str) -> None:
    items = {item.job_id: item.mutations[0] for item in database.work_items}
    ran = [
        (items[job], result)
        for job, result in database.results
        if result.worker_outcome is not WorkerOutcome.SKIPPED
    ]
    survivors = [m for m, result in ran if result.test_outcome is TestOutcome.SURVIVED]
    print(f"{room}: {len(ran) - len(survivors)} of {len(ran)} mutants killed")
    for mutation in survivors:
        print(f"  survived: line {mutation.start_pos[0]} of {key(tree, mutation)}")


if __name__ == "__main__":
    main()
