"""Every measurement, kept as it is made: where a search goes on, and what its time goes by."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from .. import report


class Ledger:
    """Measurements in a JSON file, made once each and only while there is time for them.

    path, header: as in `report.resumed`.
    budget: seconds, those of the rows that the file holds already among them.
    """

    def __init__(self, path: Path, header: dict[str, Any], budget: float) -> None:
        self._path = path
        self.results = report.resumed(path, header)
        self.budget = budget
        self._known = {_key(row["of"]): row for row in self.results["rows"]}

    @property
    def spent(self) -> float:
        """The seconds that all measurements took."""
        return sum(row["seconds"] for row in self.results["rows"])

    def measured(
        self, of: dict[str, Any], share: float, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Return what was measured, or measure it; None if that would pass a share of the budget.

        It is expected to take as long as others of its kind. of: what it is, `kind` among it.
        """
        if (known := self._known.get(_key(of))) is not None:
            return known
        took = [r["seconds"] for r in self.results["rows"] if r["of"]["kind"] == of["kind"]]
        if self.spent + (median(took) if took else 0.0) > share * self.budget:
            return None
        began = time.perf_counter()
        found = measure()
        seconds = round(time.perf_counter() - began, 3)
        row = json.loads(json.dumps({"of": of, **found, "seconds": seconds}))
        self._known[_key(of)] = row
        self.results["rows"].append(row)
        report.write_results(self._path, self.results)
        return row

    def conclude(self, found: dict[str, Any]) -> None:
        """Add what the measurements say to the file."""
        report.write_results(self._path, self.results | found)


def _key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)
