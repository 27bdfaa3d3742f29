"""The test suite on the GPU, a folder of tests/ per step, spread over processes by test.

It leaves out tests that compile for minutes or concern the host: the audit, the evaluation, the
builds. Each process may hold MEMORY of the card; tests that need more run first and alone, if the
card has it. A step that ran out of time continues when it is run again with the same sources.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .build import about
from .shard_log import END, SHARD, left, read, reopen
from .step import BUILD, ROOT, Deadline, Verdict

TESTS = ROOT / "tests"
MEMORY = 2.0  # GiB of a process, without its context
CONTEXT, SPARE = 1.0, 2.0  # GiB: of a process; of the card
LARGE = "gpu_memory"  # the marker of tests that need more
REST = 20.0  # seconds left for the last tests to end
OF = "of.txt"  # beside the logs of an unfinished run: what it was made with
KINDS = (".py", ".json", ".h", ".cpp", ".cu")  # of sources
OF_THE_HOST = (
    *("amx_emulated", "bench", "build", "cuda_emulated", "docs", "examples", "first_use"),
    *("gpu_audit", "gpu_kernels", "gpu_steps", "import_direction", "length_generalization"),
    *("recipes", "sources", "tables"),
)
LEFT_OUT = ("evaluation", *(f"package/test_{name}.py" for name in OF_THE_HOST))


def folders() -> list[str]:
    """List the folders of tests, those of kernels first."""
    first = ("rope", "attention", "decode")
    found = {path.parent.name for path in TESTS.glob("*/test_*.py")} - set(LEFT_OUT)
    return [*(name for name in first if name in found), *sorted(found - set(first))]


def of(folder: str) -> Callable[[Deadline], Verdict]:
    return partial(run, folder)


def run(folder: str, deadline: Deadline) -> Verdict:
    import torch

    if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        return Verdict(False, f"{' and '.join(missing)} not installed")
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    count = workers(total, os.cpu_count() or 1)
    logs, printed = BUILD / f"suite-{folder}", []
    open_logs(logs, f"{made_with()}, {count} processes")
    if needs_more(folder):  # first: they are few, and time might be too short at the end
        printed.append(part(folder, 0, 1, logs, deadline, total - SPARE))
    with ThreadPoolExecutor(count) as pool:
        parts = [pool.submit(part, folder, i, count, logs, deadline) for i in range(count)]
        printed += [one.result() for one in parts]
    (logs / "printed.txt").write_text("\n".join(printed))
    names = [*range(count), *(["large"] if needs_more(folder) else [])]
    parts = [logs / f"{name}.jsonl" for name in names]
    if all(left(log) == 0 for log in parts):
        (logs / OF).unlink()
    return verdict(parts, count, logs)


def open_logs(logs: Path, of: str) -> None:
    """Open the logs of a cut run if it was made with the same; else new ones."""
    if (logs / OF).exists() and (logs / OF).read_text() == of:
        for log in logs.glob("*.jsonl"):
            reopen(log)
        return
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    (logs / OF).write_text(of)


def made_with() -> str:
    """Return all that decides the tests and their outcomes: sources, packages, backends."""
    from extrope_kernels.testing import attention_backends, available_backends

    found = {key: x for key, x in about().items() if key not in ("commit", "when")}
    return f"{sources()} {found} {available_backends()} {attention_backends()}"


def sources() -> str:
    digest = hashlib.sha256()
    for folder in ("extrope_kernels", "csrc", "tests"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in KINDS:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def needs_more(folder: str) -> bool:
    return any(LARGE in path.read_text() for path in (TESTS / folder).glob("test_*.py"))


def workers(gibibytes: float, cores: int) -> int:
    """Return the number of processes that fit into a card of that memory."""
    return max(1, min(cores, int((gibibytes - SPARE) / (MEMORY + CONTEXT))))


def part(
    folder: str, index: int, count: int, logs: Path, deadline: Deadline, large: float = 0.0
) -> str:
    """Run one part; repeat after the test that ended it, as long as that makes progress.

    large: GiB for the tests that need more than MEMORY; then only those run.
    """
    log = logs / f"{'large' if large else index}.jsonl"
    printed, before = [], -1
    while deadline.left > REST and left(log) != 0:
        printed.append(pytest(folder, f"{index}/{count} {log}", deadline, large))
        total, done = read(log)
        if total is None or len(done) >= total or len(done) == before:
            break
        before = len(done)
    return "\n".join(printed)


def pytest(folder: str, shard: str, deadline: Deadline, large: float) -> str:
    left_out = [f"--ignore={TESTS / name}" for name in LEFT_OUT if name.startswith(f"{folder}/")]
    marked, count = LARGE if large else f"not {LARGE}", int(shard.split(" ")[0].split("/")[1])
    command = [sys.executable, "-m", "pytest", str(TESTS / folder), "-q", "-p", "gpu.shard"]
    env = {
        **os.environ,
        SHARD: shard,
        END: str(deadline.end - REST),
        "EXTROPE_GPU_MEMORY": str(large or MEMORY),
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
    }
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", f"{marked} and not thorough"]
    command += left_out
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=deadline.left
        )
    except subprocess.TimeoutExpired as late:
        return f"ended at its limit\n{(late.stdout or b'').decode(errors='replace')}"
    return done.stdout + done.stderr


def verdict(logs: list[Path], count: int, printed: Path | None = None) -> Verdict:
    """Read the verdict from the logs: how many ran of how many, and which failed."""
    totals, found = [], {}
    for log in logs:
        total, done = read(log)
        totals.append(total)
        found |= done
    unknown = totals.count(None)
    if unknown == len(totals):
        return Verdict(False, f"no tests were collected: see {printed}")
    states = Counter(entry["state"] for entry in found.values())
    total = sum(number or 0 for number in totals)
    ran = sum(states.values()) - states["started"]
    line = f"{ran} of {total} ran, {states['passed']} passed, {states['failed']} failed, "
    line += f"{states['skipped']} skipped"
    if states["started"]:
        line += f", {states['started']} started and never ended"
    line += f"; {count} processes"
    more = sum(left(log) or 0 for log in logs)
    line += f"; {more} left: run the step again, it goes on there" if more else ""
    line += f"; {unknown} processes collected no tests: see {printed}" if unknown else ""
    bad = [
        {"test": name, "state": entry["state"], "why": entry.get("why", "")}
        for name, entry in sorted(found.items())
        if entry["state"] in ("failed", "started")
    ]
    for entry in bad[:40]:
        print(f"{entry['state']}: {entry['test']}: {entry['why']}", flush=True)
    ok = ran == total > 0 and not bad and not unknown
    return Verdict(ok, line, {"ran": ran, "tests": total, "left": more, "bad": bad, **states})
