"""Runs every method at every length and keeps each row as it finishes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from extrope_kernels.evaluation import UsageError, report
from extrope_kernels.evaluation.models import decoder_layers, training_length
from extrope_kernels.evaluation.options import Plan
from extrope_kernels.evaluation.tasks import Task
from extrope_kernels.integrations.transformers import extend

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_rows(
    task: Task, model: PreTrainedModel, plan: Plan, args: argparse.Namespace, out: Path
) -> None:
    """Measure each (method, length), show it and write it into `<task>.json` and `<task>.png`.

    Raises UsageError before the first row when the model or its parameters do not suit a method.
    """
    trained = training_length(model)
    rows = [
        (method, length, plan.method_params(method, length, trained))
        for method in plan.methods
        for length in plan.lengths
    ]
    for method, _, params in rows:
        _check_method(model, method, params)
    results = _header(task, model, args, trained)
    heads = task.heads()
    widths = [max(6, len(head)) for head in heads]
    with report.open_display(sys.stdout, len(rows)) as display:
        display.line(report.format_line("method", "tokens", heads, widths))
        for method, length, params in rows:
            display.begin(f"{method} {length}", task.ticks(len(decoder_layers(model))))
            began = time.perf_counter()
            with extend(model, method, **params):
                row = task.measure(model, length, display.tick)
            seconds = round(time.perf_counter() - began, 2)
            row = {"method": method, "length": length, "params": params, "seconds": seconds} | row
            results["rows"].append(row)
            report.write_results(out / f"{task.name}.json", results)
            task.plot(results, out / f"{task.name}.png")
            display.line(report.format_line(method, str(length), task.cells(row), widths))


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
        "training_length": trained,
        "dtype": args.dtype,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
        **task.settings(),
        "rows": [],
    }
