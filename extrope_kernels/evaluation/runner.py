"""`evaluate`: run a task for every method at every length, and keep each row as it finishes."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from .._usage import UsageError
from ..integrations.transformers.layers import without_dropout
from . import models, options, plots, report, texts
from .digests import model_digest
from .loss import LossTask
from .models import after_each_layer, decoder_layers, lengths_of
from .recall import RecallTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS: dict[str, type[LossTask | RecallTask]] = {"loss": LossTask, "recall": RecallTask}
_WIDTH = len("2.471±.012")


def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]] | None,
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
        length and training length, the same as by the command. "auto" is the method that `extend`
        chooses for a length; "saved", or None, what the model's folder was saved as extended by.
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
    saved = options.saved_folder(model)
    params, wanted = options.check_methods(methods, saved), options.check_lengths(lengths)
    options.check_positive(bucket=bucket, trials=trials)
    options.check_choice("task", task, TASKS)
    options.check_choice("dtype", dtype, options.DTYPES)
    path = None if out is None else options.check_out(Path(out)) / f"{task}.json"
    measured = TASKS[task](wanted, bucket)
    named = [text] if isinstance(text, str) else text
    texts.check_files(named)
    files = None
    if isinstance(model, str | os.PathLike):
        files, device = models.prepared(os.fspath(model), device)
        tokenizer = models.load_tokenizer(files)
    else:
        model = models.with_body(model)
        if tokenizer is None:
            raise UsageError("a loaded model needs its tokenizer")
    read = texts.read_texts(tokenizer, named)
    texts.check_tokens(read, max(wanted) + measured.more)
    loaded = model if files is None else models.load_model(files, dtype, device)
    header = {
        "model": Path(os.path.abspath(model) if files else model.name_or_path).name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "task": task,
        "model_digest": model_digest(loaded),
        "training_length": lengths_of(loaded).trained,
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
        **measured.settings,
        "texts": [each.about() for each in read],
        "trials": trials,
        "seed": seed,
    }
    with without_dropout(loaded), warnings.catch_warnings():
        # Lengths within the training are read for comparison.
        warnings.filterwarnings("ignore", ".*leaves nothing extended")
        if saved is not None:
            taken = (
                "as it was saved" if options.AS_SAVED in params else "by the methods named alone"
            )
            print(f"{model} was saved as extended by {saved}: read {taken}", file=sys.stderr)
        planned = _planned(loaded, params, wanted)
        rows = report.Rows(path, header, ("method", "length", "params"))
        _measure(measured, loaded, read, planned, rows, table or io.StringIO())
    return rows.results


def _planned(
    model: PreTrainedModel, methods: dict[str, dict[str, Any]], lengths: list[int]
) -> list[dict[str, Any]]:
    """Return the rows to measure; raises UsageError if a method does not suit the model."""
    known = lengths_of(model)
    if set(methods) - {"rope"} and max(lengths) <= known.trained:
        print(
            f"nothing is extended: {max(lengths):,} tokens are within the {known.trained:,} that "
            "the model was trained to",
            file=sys.stderr,
        )
    rows = []
    for name, given in methods.items():
        for length in lengths:
            if name == options.AUTO:
                method, params = options.chosen(model, length)
            else:
                method = name
                params = options.method_params(method, length, known.reach, known.trained, given)
                if why := options.refusal(model, method, params):
                    raise UsageError(why)
            row = {"method": method, "length": length, "params": params}
            if row not in rows:  # "auto" may choose one that is named too
                rows.append(row)
    return rows


def _measure(
    task: LossTask | RecallTask,
    model: PreTrainedModel,
    read: Sequence[texts.Text],
    planned: list[dict[str, Any]],
    rows: report.Rows,
    table: TextIO,
) -> None:
    """Measure the rows that are missing, and show and draw each."""
    missing = sum(rows.known(row) is None for row in planned)
    wide = max(12, *(len(row["method"]) for row in planned))
    widths = [max(_WIDTH, len(head)) for head in task.heads]
    trials, seed = rows.results["trials"], rows.results["seed"]
    layers, each = len(decoder_layers(model)), len(read) * trials
    into = f" into {rows.path}" if rows.path else ""
    print(f"{missing * each} texts to read{into}", file=sys.stderr, flush=True)

    def line(method: str, length: str, cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
        return f"{method:<{wide}} {length:>6} {' '.join(padded)}"

    def measure(display: report.Display, method: str, length: int, params: Any) -> dict[str, Any]:
        places = [(text, index) for text in read for index in range(trials)]
        pieces = [text.piece(length, index, seed, task.more) for text, index in places]
        found = []
        with options.extended(model, method, params):
            for number, piece in enumerate(pieces, 1):
                name = f"reading text {number} of {each} by {method}, {length:,} tokens"
                display.begin(name, layers)
                found.append(task.read(model, piece))
        return task.row(found)

    with report.Display(table, missing * each) as display, after_each_layer(model, display.tick):
        display.line(line("method", "tokens", task.heads))
        for plan in planned:
            row = rows.known(plan) or rows.add(plan, partial(measure, display, **plan))
            if rows.path and plots.available():
                plots.plot(rows.results, rows.path.with_suffix(".png"))
            display.line(line(row["method"], str(row["length"]), task.cells(row)))
