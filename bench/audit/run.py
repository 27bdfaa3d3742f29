"""Compile cases on all cores; or recall them, where the same has been compiled before."""

from __future__ import annotations

import gzip
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .case import Binary, Case
from .entries import KERNELS
from .reading import Code, read
from .row import Row, row

CACHE = Path(__file__).resolve().parent.parent.parent / "build" / "gpu_audit" / version("triton")


def run(
    cases: Iterable[Case],
    jobs: int,
    known: Mapping[Case, Code],
    progress: Callable[[Case], None] = lambda case: None,
    afresh: bool = False,
) -> tuple[dict[Case, Row], dict[Case, str]]:
    """The rows of `cases`, in their order, and why others did not compile; after an interrupt, of
    those that were done.

    A case is compiled unless what decides its machine code is what decided that of its row in
    `known`, or of its binary in build/. afresh: compile it anyhow.
    """
    cases = list(cases)
    parts: dict[str, list[Case]] = {}
    for case in cases:
        name = case.kernel if KERNELS[case.kernel].at_once else str(case)
        parts.setdefault(name, []).append(case)
    found: dict[Case, Row] = {}
    failed: dict[Case, str] = {}
    with ProcessPoolExecutor(jobs, initializer=_leave_interrupts_to_the_parent) as pool:
        try:
            tasks = [
                pool.submit(rows, part, [known.get(case) for case in part], afresh)
                for part in parts.values()
            ]
            for task in as_completed(tasks):
                for case, result in task.result().items():
                    if isinstance(result, str):
                        failed[case] = result
                    else:
                        found[case] = result
                    progress(case)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    return {case: found[case] for case in cases if case in found}, failed


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def rows(cases: list[Case], known: list[Code | None], afresh: bool) -> dict[Case, Row | str]:
    """Of each case its row, or what its compiler said."""
    found: dict[Case, Row | str] = {}
    for case, code in zip(cases, known):
        try:
            found[case] = _row(case, code, afresh)
        except Exception:  # of any kind: the other cases are to be compiled all the same
            found[case] = traceback.format_exc()
    return found


def _row(case: Case, known: Code | None, afresh: bool) -> Row:
    source, traffic = KERNELS[case.kernel].prepare(case)
    made_from = source.made_from(case.capability)[:12]
    if not afresh and known is not None and known.made_from == made_from:
        return row(known, traffic)
    binary = None if afresh else _recall(case, made_from)
    if binary is None:
        binary = source.compile(case.capability)
        _keep(case, binary, made_from)
    return row(read(case, binary, made_from), traffic)


def _path(case: Case) -> Path:
    return CACHE / f"{case}.json.gz"


def _keep(case: Case, binary: Binary, made_from: str) -> None:
    path = _path(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    text = json.dumps({"made_from": made_from, "binary": asdict(binary)})
    temporary.write_bytes(gzip.compress(text.encode(), 5))
    temporary.replace(path)


def _recall(case: Case, made_from: str) -> Binary | None:
    try:
        kept = json.loads(gzip.decompress(_path(case).read_bytes()))
    except FileNotFoundError:
        return None
    return Binary(**kept["binary"]) if kept["made_from"] == made_from else None
