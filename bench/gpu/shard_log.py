"""What the parts of a suite tell, in lines of JSON: how many tests, and what became of each."""

from __future__ import annotations

import json
from pathlib import Path

SHARD, END = "EXTROPE_SHARD", "EXTROPE_SHARD_END"  # of the environment of a part
WORST = {"started": 0, "passed": 1, "skipped": 2, "failed": 3}


def read(log: Path) -> tuple[int | None, dict[str, dict]]:
    """How many tests the part has, None before they are known, and what became of each so far."""
    total, found = None, {}
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        if "tests" in entry:
            total = entry["tests"] if total is None else total
        else:
            before = found.get(entry["test"], {"state": "started"})
            if WORST[entry["state"]] >= WORST[before["state"]]:
                found[entry["test"]] = entry
    return total, found
