"""The tasks of `eval`, run for every method at every length; each row is kept as it finishes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..integrations.transformers import extend
from . import UsageError, plots, report
from .digests import model_digest
from .loss import LossTask
from .models import decoder_layers, training_length, unscaled_length
from .options import Plan
from .passkey import PasskeyTask
from .recall import RecallTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Task(Protocol):
    """A measurement that yields one row for a model as it is at one length."""

    name: str

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on besides model and method."""

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""

    def ticks(self, layers: int) -> int:
        """Return how much progress `measure` reports with a model of so many layers."""

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the numbers of a row."""

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each head that the row reaches."""

    def plot(self, results: dict[str, Any], path: Path) -> None:
        """Draw all rows as PNG."""


TASKS = {task.name: task for task in (LossTask, PasskeyTask, RecallTask)}

_WIDTH = len("2.471±.012")


def run_rows(
    task: Task, model: PreTrainedModel, plan: Plan, args: argparse.Namespace, out: Path
) -> None:
    """Measure each (method, length), show it and write it into `<task>.json` and `<task>.png`.

    There is no PNG without matplotlib.

    Raises UsageError before the first row when the model or its parameters do not suit a method.
    """
    trained, unscaled = training_length(model), unscaled_length(model)
    rows = [
        {
            "method": method,
            "length": length,
            "params": plan.method_params(method, length, trained, unscaled),
        }
        for method in plan.methods
        for length in plan.lengths
    ]
    for row in rows:
        _check_method(model, row["method"], row["params"])
    path = out / f"{task.name}.json"
    results = report.resumed(path, _header(task, model, args, trained))
    done = {_key(row): row for row in results["rows"]}
    missing = sum(_key(row) not in done for row in rows)
    print(f"measuring {missing} of {len(rows)} rows into {path}", file=sys.stderr, flush=True)
    heads = task.heads()
    widths = [max(_WIDTH, len(head)) for head in heads]
    wide = max(map(len, plan.methods))
    with report.open_display(sys.stdout, missing) as display:
        display.line(report.format_line("method".ljust(wide), "tokens", heads, widths))
        for row in rows:
            if _key(row) in done:
                row = done[_key(row)]
            else:
                row |= _measured(task, model, row, display)
                results["rows"].append(row)
                report.write_results(path, results)
            if plots.available():
                task.plot(results, path.with_suffix(".png"))
            name, length = row["method"].ljust(wide), str(row["length"])
            display.line(report.format_line(name, length, task.cells(row), widths))


def _measured(
    task: Task, model: PreTrainedModel, row: dict[str, Any], display: report.Display
) -> dict[str, Any]:
    method, length = row["method"], row["length"]
    display.begin(f"{method} {length}", task.ticks(len(decoder_layers(model))))
    began = time.perf_counter()
    with extend(model, method, **row["params"]):
        measured = task.measure(model, length, display.tick)
    return {"seconds": round(time.perf_counter() - began, 2), **measured}


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["method"], row["length"], row["params"]], sort_keys=True)


def _check_method(model: PreTrainedModel, method: str, params: dict[str, Any]) -> None:
    try:
        with extend(model, method, **params):
            pass
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(str(error)) from error


def _header(
    task: Task, model: PreTrainedModel, args: argparse.Namespace, trained: int
) -> dict[str, Any]:
    return {
        "task": task.name,
        "model": Path(args.model).name,
        "model_digest": model_digest(model),
        "training_length": trained,
        "dtype": args.dtype,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
        **task.settings(),
        "rows": [],
    }
