"""Compile cases on all cores, or recall them: what came of the same sources is kept in build/."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from .case import Binary, Case, Measured, Traffic
from .entries import KERNELS
from .row import Row, row

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "gpu_audit"


def run(
    cases: Iterable[Case], jobs: int, progress: Callable[[Case], None] = lambda case: None
) -> dict[Case, Row]:
    """The rows of `cases`, in their order; after an interrupt, of those that were done."""
    cases = list(cases)
    parts: list[tuple[str, list[Case]]] = []
    for name in dict.fromkeys(case.kernel for case in cases):
        if KERNELS[name].at_once:
            parts.append((name, [case for case in cases if case.kernel == name]))
    parts += [(case.kernel, [case]) for case in cases if not KERNELS[case.kernel].at_once]
    found: dict[Case, Row] = {}
    with ProcessPoolExecutor(jobs, initializer=_leave_interrupts_to_the_parent) as pool:
        try:
            for task in as_completed([pool.submit(_rows, *part) for part in parts]):
                for result in task.result():
                    found[result.case] = result
                    progress(result.case)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    return {case: found[case] for case in cases if case in found}


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _rows(name: str, cases: list[Case]) -> list[Row]:
    known = [_recall(case) for case in cases]
    if None in known:
        known = list(KERNELS[name].measure(cases))
        for measured in known:
            _keep(measured)
    return [row(*measured) for measured in known]


def _path(case: Case) -> Path:
    return CACHE / _sources(case.kernel) / f"{case}.json.gz"


@lru_cache
def _sources(name: str) -> str:
    """A hash of all that decides what is compiled: a kernel's sources, the entries, Triton."""
    digest = hashlib.sha256(f"{name} {importlib.metadata.version('triton')}".encode())
    folders = (ROOT / folder for folder in KERNELS[name].folders)
    for folder in (Path(__file__).parent / "entries", *folders):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".h", ".cu"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _keep(measured: Measured) -> None:
    case, binary, traffic = measured
    path = _path(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    text = json.dumps({"binary": asdict(binary), "traffic": asdict(traffic)})
    temporary.write_bytes(gzip.compress(text.encode(), 5))
    temporary.replace(path)


def _recall(case: Case) -> Measured | None:
    try:
        fields = json.loads(gzip.decompress(_path(case).read_bytes()))
    except FileNotFoundError:
        return None
    return case, Binary(**fields["binary"]), Traffic(**fields["traffic"])
