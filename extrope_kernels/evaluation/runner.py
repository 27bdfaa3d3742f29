"""`evaluate`: a task for every method at every length; each row is kept as it finishes."""

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
    """A measurement that yields one row for a model as it is at one length."""

    name: str
    reading: texts.Reading

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on besides model, method and reading."""

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""

    def ticks(self, layers: int) -> int:
        """Return how often `measure` reports progress with a model of so many layers."""

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        """Return the numbers of a row."""

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each head that the row reaches."""

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

    It is what the `eval` command runs. Each row is written as it finishes, so that the same call
    goes on after Ctrl-C; results of other settings are never overwritten.

    model: a transformers folder, a .gguf file, "smollm2", "gemma3-270m"; or a loaded model, which
        is left as it was.
    methods: names of methods, or the parameters of each by its name. What is not given is chosen
        by length and training length, as the command does.
    lengths: of texts, in tokens.
    task: "loss", the mean next-token loss by position, in nats, or "recall", by how many nats a
        token a passage costs less the second time, by the tokens between.
    text: UTF-8 files; "pydocs" is the Python reference.
    tokenizer: of a loaded model.
    factor: of all frequency methods.
    window: of all score methods that have one, in tokens.
    bucket: positions whose losses are averaged.
    trials: pieces of each text.
    seed: of where texts are cut.
    dtype: "float32" or "bfloat16", of a model that is loaded here.
    device: of torch, likewise; CUDA where there is one, else the CPU, if None.
    out: a folder for TASK.json, and TASK.png where there is matplotlib; None keeps neither.
    table: where to print a line for each row, such as sys.stdout.

    Returns the settings and "rows": each has a method, its params, a length, and "loss" with
    "buckets", or "gains" by distance; standard errors, over pieces or passages, are "error".
    Raises UsageError, a ValueError of one line, before anything slow.
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
    """Return what the numbers depend on."""
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
    """Return a model from disk, and the task, which is made first: its mistakes show at once."""
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
    """Return the rows to measure; raises UsageError where the model does not suit a method."""
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
