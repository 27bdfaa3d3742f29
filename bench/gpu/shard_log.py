"""Logs of a suite's parts, in lines of JSON: the number of tests, and the outcome of each.

A part that was cut continues from its log. The test that it was cut at is tried once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SHARD, END = "EXTROPE_SHARD", "EXTROPE_SHARD_END"  # of the environment of a part
WORST = {"started": 0, "passed": 1, "skipped": 2, "failed": 3}
AGAIN = "again"  # the state of a test that started, did not end, and is to be tried once more


def read(log: Path) -> tuple[int | None, dict[str, dict]]:
    """Return the number of a part's tests (None if not known yet), and the outcomes so far."""
    total, found = None, {}
    for entry in _entries(log):
        if "tests" in entry:
            total = entry["tests"] if total is None else total
        elif entry["state"] == AGAIN:
            del found[entry["test"]]
        else:
            before = found.get(entry["test"], {"state": "started"})
            if WORST[entry["state"]] >= WORST[before["state"]]:
                found[entry["test"]] = entry
    return total, found


def tried_again(log: Path) -> set[str]:
    return {entry["test"] for entry in _entries(log) if entry.get("state") == AGAIN}


def to_try(log: Path) -> list[str]:
    """Return the tests that started but did not end, except those that did so twice."""
    twice = tried_again(log)
    found = read(log)[1].items()
    return [test for test, entry in found if entry["state"] == "started" and test not in twice]


def left(log: Path) -> int | None:
    """Return the number of tests that another run would finish; None if not known yet."""
    total, found = read(log)
    return None if total is None else total - len(found) + len(to_try(log))


def reopen(log: Path) -> None:
    """Prepare the log for another run of a part."""
    lines = [json.dumps({"test": test, "state": AGAIN}) for test in to_try(log)]
    with log.open("a") as file:  # after a line that may have been cut
        file.writelines(f"{line}\n" for line in ("", *lines))


def _entries(log: Path) -> Iterator[dict]:
    """Yield the entries, without a line that was cut when its process ended."""
    for line in log.read_text().splitlines() if log.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)
