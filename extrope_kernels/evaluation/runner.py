"""`evaluate`: run a task for every method at every length, and keep each row as it finishes."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from ..integrations.transformers import extend
from . import UsageError, models, options, plots, report, texts
from .digests import model_digest
from .forward import after_each_layer
from .loss import LossTask
from .models import decoder_layers, training_length, unscaled_length
from .recall import RecallTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS: dict[str, type[LossTask | RecallTask]] = {"loss": LossTask, "recall": RecallTask}
_WIDTH = len("2.471±.012")


def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    lengths: int | Iterable[int],
    *,
    task: str = "loss",
    text: str | Sequence[str] = "pydocs",
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    params, wanted = options.check_methods(methods), options.check_lengths(lengths)
    options.check_numbers(bucket=bucket, trials=trials)
    options.check_choice("task", task, TASKS)
    options.check_choice("dtype", dtype, options.DTYPES)
    path = None if out is None else options.check_out(Path(out)) / f"{task}.json"
    measured = TASKS[task](wanted, bucket)
    files = None
    if isinstance(model, str | os.PathLike):
        files, device = models.prepared(os.fspath(model), device)
        tokenizer = models.load_tokenizer(files)
    elif tokenizer is None:
        raise UsageError("a loaded model needs its tokenizer")
    read = texts.read_texts(tokenizer, [text] if isinstance(text, str) else text)
    texts.check_tokens(read, measured.tokens)
    reading = texts.Reading(read, trials, seed)
    loaded = model if files is None else models.load_model(files, dtype, device)
    header = {
        "model": Path(model if files else model.name_or_path).name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "task": task,
        **_about(loaded),
        **measured.settings,
        **reading.about(),
        "rows": [],
    }
    rows = _planned(loaded, params, wanted)
    results = header if path is None else report.resumed(path, header)
    _run_rows(measured, loaded, reading, rows, results, path, table or io.StringIO())
    return results


def _about(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the numbers depend on besides a task's settings and texts."""
    return {
        "model_digest": model_digest(model),
        "training_length": training_length(model),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
    }


def _planned(
    model: PreTrainedModel, methods: dict[str, dict[str, Any]], lengths: list[int]
) -> list[dict[str, Any]]:
    """Return the rows to measure; raises UsageError if a method does not suit the model."""
    trained, unscaled = training_length(model), unscaled_length(model)
    rows = []
    for method, given in methods.items():
        for length in lengths:
            params = options.method_params(method, length, trained, unscaled, given)
            if why := options.refusal(model, method, params):
                raise UsageError(why)
            rows.append({"method": method, "length": length, "params": params})
    return rows


def _run_rows(
    task: LossTask | RecallTask,
    model: PreTrainedModel,
    reading: texts.Reading,
    rows: list[dict[str, Any]],
    results: dict[str, Any],
    path: Path | None,
    table: TextIO,
) -> None:
    """Measure the rows that the results lack, and show, write and draw each."""
    done = {_key(row): row for row in results["rows"]}
    missing = sum(_key(row) not in done for row in rows)
    into = f" into {path}" if path else ""
    print(f"measuring {missing} of {len(rows)} rows{into}", file=sys.stderr, flush=True)
    wide = max(12, *(len(row["method"]) for row in rows))
    widths = [max(_WIDTH, len(head)) for head in task.heads]

    def line(method: str, length: str, cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
        return f"{method:<{wide}} {length:>6} {' '.join(padded)}"

    with report.Display(table, missing) as display, after_each_layer(model, display.tick):
        display.line(line("method", "tokens", task.heads))
        for row in rows:
            if _key(row) in done:
                row = done[_key(row)]
            else:
                with extend(model, row["method"], **row["params"]):
                    layers = len(decoder_layers(model))
                    display.begin(f"{row['method']} {row['length']}", layers * reading.count)
                    began = time.perf_counter()
                    measured = task.measure(model, reading, row["length"])
                row |= {"seconds": round(time.perf_counter() - began, 2), **measured}
                results["rows"].append(row)
                if path:
                    report.write_results(path, results)
            if path and plots.available():
                plots.plot(results, path.with_suffix(".png"))
            display.line(line(row["method"], str(row["length"]), task.cells(row)))


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["method"], row["length"], row["params"]], sort_keys=True)
