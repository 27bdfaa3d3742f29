"""`evaluate`: run a task for every method at every length, and keep each row as it finishes."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch

from ..integrations.transformers import extend
from . import UsageError, models, options, plots, report, texts
from .digests import model_digest
from .loss import LossTask
from .models import decoder_layers, training_length, unscaled_length
from .recall import RecallTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Task(Protocol):
    """A measurement of a model in its present state at one length: a row."""

    name: str
    reading: texts.Reading

    def settings(self) -> dict[str, Any]:
        """Return settings that the numbers depend on, besides model, method and reading."""

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""

    def ticks(self, layers: int) -> int:
        """Return how often `measure` reports progress for a model with `layers` layers."""

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        """Return the numbers of a row."""

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each column that the row reaches."""

    def plot(self, results: dict[str, Any], path: Path) -> None:
        """Draw all rows as PNG."""


TASKS = {task.name: task for task in (LossTask, RecallTask)}
DTYPES = ("float32", "bfloat16")

_WIDTH = len("2.471±.012")


def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    lengths: int | Iterable[int],
    *,
    task: str = "loss",
    text: str | Sequence[str] = "pydocs",
    tokenizer: PreTrainedTokenizerBase | None = None,
    factor: float | None = None,
    window: int | None = None,
    bucket: int = 2048,
    trials: int = 3,
    seed: int = 0,
    dtype: str = "float32",
    device: str | None = None,
    out: str | os.PathLike[str] | None = None,
    table: TextIO | None = None,
) -> dict[str, Any]:
    """Measure how well a model reads texts of some lengths under each method.

    The `eval` command runs this function. Each row is written as it finishes, so the same call
    goes on after Ctrl-C; results of other settings are never overwritten.

    model: a transformers folder, a .gguf file, "smollm2", "gemma3-270m"; or a loaded model, which
        stays unchanged.
    methods: names of methods, or a dict from name to parameters. Missing parameters are chosen by
        length and training length, the same as by the command.
    lengths: lengths of texts, in tokens.
    task: "loss": the mean next-token loss by position, in nats; or "recall": how much less a
        passage costs the second time, in nats a token, by the distance in tokens.
    text: UTF-8 files; "pydocs" is the Python reference.
    tokenizer: a loaded model's tokenizer.
    factor: the factor of all frequency methods.
    window: the window, in tokens, of all score methods that have one.
    bucket: number of positions whose losses are averaged.
    trials: pieces of each text.
    seed: seed of the places where texts are cut.
    dtype: "float32" or "bfloat16", for a model that this call loads.
    device: a torch device, for a model that this call loads; if None, CUDA or else the CPU.
    out: a folder for TASK.json, and TASK.png with matplotlib; None writes neither.
    table: stream that gets a line for each row, such as sys.stdout.

    Returns the settings and "rows". Each row has a method, its params, a length, and "loss" with
    "buckets", or "gains" by distance; "error" is the standard error over pieces or passages.
    Raises UsageError, a ValueError of one line, before anything slow begins.
    """
    plan = options.make_plan(methods, lengths, factor, window)
    names = [text] if isinstance(text, str) else list(text)
    asked = texts.Asked(names, plan.lengths, trials, seed, bucket)
    options.check_numbers(bucket=bucket, trials=trials)
    options.check_choice("task", task, TASKS)
    options.check_choice("dtype", dtype, DTYPES)
    folder = None if out is None else options.check_out(os.fspath(out))
    if isinstance(model, str | os.PathLike):
        header = {"model": Path(model).name, "dtype": dtype}
        make = partial(TASKS[task], asked=asked)
        loaded, made = _loaded(os.fspath(model), dtype, device, make)
    elif tokenizer is None:
        raise UsageError("a loaded model needs its tokenizer")
    else:
        loaded_dtype = str(model.dtype).removeprefix("torch.")
        header = {"model": Path(model.name_or_path).name, "dtype": loaded_dtype}
        loaded, made = model, TASKS[task](tokenizer, asked)
    header |= {"task": task, **_about(made, loaded), "rows": []}
    return _run_rows(made, loaded, plan, header, folder, table or io.StringIO())


def _about(task: Task, model: PreTrainedModel) -> dict[str, Any]:
    """Return settings that the numbers depend on."""
    return {
        "model_digest": model_digest(model),
        "training_length": training_length(model),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
        **task.settings(),
        **task.reading.about(),
    }


def _loaded(
    name: str, dtype: str, device: str | None, make: Callable[[PreTrainedTokenizerBase], Task]
) -> tuple[PreTrainedModel, Task]:
    """Load a model from disk, and make the task first, so that its mistakes show at once."""
    files, device = models.prepared(name, device)
    slow = " (from GGUF, which takes half a minute or more)" if files.gguf_file else ""
    print(f"loading {name}{slow}", file=sys.stderr, flush=True)
    with report.telling(lambda: f"loading {name}"):
        tokenizer = models.load_tokenizer(files)
        task = make(tokenizer)
        model = models.load_model(files, dtype, device)
        models.keep_converted(name, files, model, tokenizer)
    return model, task


def _run_rows(
    task: Task,
    model: PreTrainedModel,
    plan: options.Plan,
    header: dict[str, Any],
    out: Path | None,
    table: TextIO,
) -> dict[str, Any]:
    rows = _planned(model, plan)
    path = out / f"{task.name}.json" if out else None
    results = report.resumed(path, header) if path else header
    done = {_key(row): row for row in results["rows"]}
    missing = sum(_key(row) not in done for row in rows)
    into = f" into {path}" if path else ""
    print(f"measuring {missing} of {len(rows)} rows{into}", file=sys.stderr, flush=True)
    heads = task.heads()
    widths = [max(_WIDTH, len(head)) for head in heads]
    wide = max(map(len, plan.methods))
    with report.open_display(table, missing) as display:
        display.line(report.format_line("method".ljust(wide), "tokens", heads, widths))
        for row in rows:
            if _key(row) in done:
                row = done[_key(row)]
            else:
                row |= _measured(task, model, row, display)
                results["rows"].append(row)
                if path:
                    report.write_results(path, results)
            if path and plots.available():
                task.plot(results, path.with_suffix(".png"))
            name, length = row["method"].ljust(wide), str(row["length"])
            display.line(report.format_line(name, length, task.cells(row), widths))
    return results


def _planned(model: PreTrainedModel, plan: options.Plan) -> list[dict[str, Any]]:
    """Return the rows to measure; raises UsageError if a method does not suit the model."""
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
        try:
            with extend(model, row["method"], **row["params"]):
                pass
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UsageError(str(error)) from error
    return rows


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
