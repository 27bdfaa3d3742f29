"""The test suite on the GPU, a folder of tests/ per step, spread over processes by test.

It leaves out tests that compile for minutes or concern the host: the audit, the evaluation, the
builds. Each process may hold MEMORY of the card; tests that need more run first and alone. This
module is the pytest plugin of these processes too: it runs every n-th test until time is up, and
logs each start and end. So a part goes on behind a crash, and a step that was too short goes on
when it is run again with the same sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from extrope_kernels.testing import available_backends

from .results import BUILD, ROOT, TESTS, Deadline, Verdict, about

if TYPE_CHECKING:
    import pytest

MEMORY = 2.0  # GiB of a process, without its context
CONTEXT, SPARE = 1.0, 2.0  # GiB: of a process; of the card
LARGE = "gpu_memory"  # the marker of tests that need more
REST = 20.0  # seconds left for the last tests to end
PART = "EXTROPE_GPU_PART"  # of a part's environment: its number, their number, its end and its log
OF_THE_HOST = ("audit", "kernels", "steps")  # of tests/gpu


def run(folder: str, deadline: Deadline) -> Verdict:
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    count = processes(total, os.cpu_count() or 1)
    logs = BUILD / f"suite-{folder}"
    made_with = about() | {"commit": "", "when": 0, "backends": available_backends()}
    open_logs(logs, f"{sources()} {made_with} {count}")
    go = partial(run_part, folder, logs, deadline)
    if any(LARGE in path.read_text() for path in (TESTS / folder).glob("test_*.py")):
        go(0, 1, total - SPARE)  # first: they are few, and time might be too short at the end
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda index: go(index, count), range(count)))
    found = verdict(sorted(logs.glob("*.jsonl")), count)
    if found.content.get("left") == 0:
        shutil.rmtree(logs)
    return found


def processes(gibibytes: float, cores: int) -> int:
    """Return the number of processes that fit into a card of that memory."""
    return max(1, min(cores, int((gibibytes - SPARE) / (MEMORY + CONTEXT))))


def open_logs(logs: Path, made_with: str) -> None:
    """Keep the logs of a cut run if it was made with the same sources, packages and card."""
    said = logs / "made_with.txt"
    if not said.exists() or said.read_text() != made_with:
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        said.write_text(made_with)


def sources() -> str:
    digest = hashlib.sha256()
    for folder in ("extrope_kernels", "csrc", "tests"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".json", ".h", ".cpp", ".cu"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def run_part(
    folder: str, logs: Path, deadline: Deadline, index: int, count: int, large: float = 0.0
) -> None:
    """Run one part; again behind the test that ended it, as long as that makes progress.

    large: GiB for the tests that need more than MEMORY; then only those run.
    """
    log, before = logs / f"{'large' if large else index}.jsonl", -1
    command = [sys.executable, "-m", "pytest", str(TESTS / folder), "-q", "-p", __name__]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", f"{LARGE if large else f'not {LARGE}'} and not thorough"]
    command += [f"--ignore={TESTS}/gpu/test_gpu_{name}.py" for name in OF_THE_HOST]
    env = os.environ | {
        PART: json.dumps([index, count, deadline.end - REST, str(log)]),
        "EXTROPE_GPU_MEMORY": str(large or MEMORY),
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
    }
    while deadline.left > REST and before < len(states(log)[1]):
        before = len(states(log)[1])
        tell(log, process=before)
        with log.with_suffix(".txt").open("a") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
            try:
                process.wait(deadline.left)
            except subprocess.TimeoutExpired:
                process.kill()
                tell(log, cut=True)
        total, found = states(log)
        if total is None or len(found) >= total:
            break


# -------------------------------------------------------------------------------------------------
# The log of a part, in lines of JSON


def tell(log: Path, **what: Any) -> None:
    with log.open("a") as file:
        file.write(json.dumps(what) + "\n")


def states(log: Path) -> tuple[int | None, dict[str, dict]]:
    """Return the number of a part's tests (None if not known), and the state of each that began.

    A test that was cut as time was up is as if it had not begun; one that ended its process stays
    "started".
    """
    total, found, of_process = None, {}, set()
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # cut as its process was ended
            continue
        total = entry.get("tests", total)
        if "process" in entry:
            of_process.clear()
        elif "cut" in entry:
            for name in [x for x in of_process if found[x]["state"] == "started"]:
                del found[name]
        elif "test" in entry:
            of_process.add(entry["test"])
            before = found.get(entry["test"], entry)
            found[entry["test"]] = before if before["state"] == "failed" else entry
    return total, found


def verdict(logs: list[Path], count: int) -> Verdict:
    """Read the verdict from the logs: how many ran of how many, and which failed."""
    totals, found = [], {}
    for log in logs:
        total, own = states(log)
        totals.append(total)
        found |= own
    if not totals or None in totals:
        return Verdict(False, f"a process collected no tests: see {BUILD}")
    each = Counter(entry["state"] for entry in found.values())
    total, more = sum(totals), sum(totals) - len(found)
    line = f"{len(found) - each['started']} of {total} ran, {each['passed']} passed, "
    line += f"{each['failed']} failed, {each['skipped']} skipped"
    line += f", {each['started']} ended their process" if each["started"] else ""
    line += f"; {count} processes"
    line += f"; {more} left: run the step again, it goes on there" if more else ""
    bad = [x for _, x in sorted(found.items()) if x["state"] in ("failed", "started")]
    print(*bad[:40], sep="\n", flush=True)
    ok = total > 0 and not more and not bad
    return Verdict(ok, line, {"tests": total, "left": more, "bad": bad, **each})


# -------------------------------------------------------------------------------------------------
# The plugin

SESSION: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    SESSION.append(session)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave this part's tests that have not begun; -m has been applied by then."""
    index, count, _, log = json.loads(os.environ[PART])
    own, (_, begun) = session.items[index::count], states(Path(log))
    tell(Path(log), tests=len(own))
    session.items[:] = [item for item in own if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    tell(Path(json.loads(os.environ[PART])[3]), test=nodeid, state="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = next((x for x in report.longreprtext.splitlines() if x.startswith("E ")), "")
        entry = {"test": report.nodeid, "state": report.outcome, "why": why[1:].strip()[:200]}
        tell(Path(json.loads(os.environ[PART])[3]), **entry)
        if report.outcome == "failed" and "CUDA error" in report.longreprtext:  # later calls fail
            SESSION[-1].shouldstop = "the CUDA context is lost"


def pytest_runtest_logfinish() -> None:
    if time.time() > json.loads(os.environ[PART])[2]:
        SESSION[-1].shouldstop = "time is up"
