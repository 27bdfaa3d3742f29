"""A pytest plugin that runs every n-th test until time is up, and logs each start and end.

pytest -p gpu.shard, with EXTROPE_SHARD="0/4 LOG" for the first of four parts. Tests in the log are
left out, so a part can be started again after a crash; the test that it was cut at goes last.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from .shard_log import END, SHARD, read, tried_again

LOST = "CUDA error"  # after it every later call in the process fails

_session: list[pytest.Session] = []


def _part() -> tuple[int, int, Path]:
    numbers, log = os.environ[SHARD].split(" ", 1)
    index, count = map(int, numbers.split("/"))
    return index, count, Path(log)


def _tell(**what: object) -> None:
    with _part()[2].open("a") as file:
        file.write(json.dumps(what) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    _session.append(session)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count, log = _part()
    own = items[index::count]
    _, done = read(log)
    _tell(tests=len(own))
    again = tried_again(log)
    left = [item for item in own if item.nodeid not in done]
    left.sort(key=lambda item: item.nodeid in again)
    kept = set(left)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = left


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(test=nodeid, state="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        _tell(test=report.nodeid, state=report.outcome, why="".join(lines[:1])[1:].strip()[:200])
        if report.outcome == "failed" and LOST in report.longreprtext:
            _session[-1].shouldstop = "the CUDA context is lost"


def pytest_runtest_logfinish() -> None:
    if time.time() > float(os.environ[END]):
        _session[-1].shouldstop = "time is up"
