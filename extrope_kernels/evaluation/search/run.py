"""Run a search; print, draw and write its results on held-out text."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...integrations._shared.parameters import SAVED
from ...integrations.transformers.probe.rotary import find_rotary_modules
from ...scores import SCORES
from .. import UsageError, models, options, plots, report
from ..digests import model_digest
from ..models import after_each_layer
from ..texts import Text, check_tokens, read_text, read_texts
from .candidates import Candidate
from .pieces import NUMBERS, OBJECTIVES, SHORTEST, tokens_for
from .stages import Search

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COLUMNS = {"last quarter": "loss", "to yarn": "to_yarn", "whole": "whole", "recall": "recall"}


def search(
    model: str,
    texts: str | Sequence[str],
    length: int,
    out: str | Path,
    *,
    held_out: str | None = None,
    budget: float = 60.0,
    objective: str = "loss",
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Search for the method and parameters by which a model reads a length best.

    Writes search.json, search.png (with matplotlib) and extended/config.json, which has the best
    frequencies, into `out`. The same call continues an interrupted search,
    and a call with a larger budget continues a finished one.

    model: a transformers folder, a .gguf file, or a name in `models.PACKAGES`.
    texts: UTF-8 files to search on, or "pydocs", the Python reference; one or several.
    length: tokens that the model is to read.
    held_out: text to decide on; the second half of each of `texts` if None.
    budget: minutes of measuring.
    objective: "loss", of the last quarter of a text, or "recall", the loss of repeated passages,
        whose first copy is up to fifteen sixteenths of the length before.
    dtype, device: the model's; if device is None, a GPU if there is one.
    seed: seed of the places where texts are cut.

    Returns the content of search.json: `finalists` has a row each, the best first, with its
    `method`, `params` and `call`.
    Raises UsageError, a ValueError, if the search cannot be done.
    """
    if length < SHORTEST:
        raise UsageError(f"--length must be >= {SHORTEST}, got {length}")
    if not budget > 0:
        raise UsageError(f"--budget must be > 0, got {budget:g}")
    options.check_choice("objective", objective, OBJECTIVES)
    options.check_choice("dtype", dtype, options.DTYPES)
    folder = options.check_out(Path(out))
    files, on = models.prepared(model, device)
    tokenizer = models.load_tokenizer(files)
    names = [texts] if isinstance(texts, str) else texts
    to_search, decides = split_texts(tokenizer, names, held_out, tokens_for(length))
    loaded = models.load_model(files, dtype, on)
    if why := options.refusal(loaded, "rope", {}):
        raise UsageError(why)
    header = {
        "task": "search",
        "model": Path(os.path.abspath(model)).name,
        "model_digest": model_digest(loaded),
        "dtype": dtype,
        "length": length,
        "objective": objective,
        "texts": [text.about() for text in to_search],
        "held_out": [text.about() for text in decides],
        "seed": seed,
        "training_length": models.unscaled_length(loaded),
        "device": str(loaded.device),
        "versions": report.versions(),
    }
    rows = report.Rows(folder / "search.json", header, ["of"])
    if held_out is None:
        print("search: the first half of each text is searched on, the second decides", flush=True)
    print(f"measuring for {budget:g} minutes into {out}", file=sys.stderr, flush=True)
    rotary_module = find_rotary_modules(loaded)[0]
    pairs = rotary_module.dim(rotary_module.layer_types[0]) // 2
    by_kind = {"search": to_search, "held-out": decides}
    seconds = 60 * budget
    with report.Display(sys.stdout, seconds) as display, after_each_layer(loaded, display.tick):
        looking = Search(loaded, pairs, by_kind, rows, seconds, display)
        finalists = looking.run()
    _conclude(looking, finalists, folder)
    return rows.results


def split_texts(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], held_out: str | None, length: int
) -> tuple[list[Text], list[Text]]:
    """Return the texts to search on and those to decide on; they have no token in common.

    Raises UsageError if a part has fewer than `length` tokens, if a text is given twice, or if a
    text is for both.
    """
    texts = read_texts(tokenizer, names)
    if held_out is None:
        halves = [text.halves() for text in texts]
        texts, decides = [first for first, _ in halves], [second for _, second in halves]
    else:
        decides = [read_text(tokenizer, held_out, "--held-out")]
        if decides[0].digest in [text.digest for text in texts]:
            raise UsageError(f"--held-out {held_out}: is searched on, too")
    check_tokens([*texts, *decides], length)
    return texts, decides


def _conclude(looking: Search, finalists: list[Candidate], folder: Path) -> None:
    """Write, draw and print the finalists, and write the best frequencies."""
    measured = [looking.on_held_out(each) for each in finalists]
    found = [
        summary(each, pieces, measured[0], looking.counts)
        for each, pieces in zip(finalists, measured, strict=True)
    ]
    found.sort(key=lambda row: row.get("to_yarn", float("inf")))
    looking.rows.results |= {"finalists": found, "seconds": round(looking.spent, 1)}
    looking.rows.write()
    if plots.available():
        plot(looking.rows.results, folder / "search.png")
    read = [row for row in found if row["pieces"]]
    if not read:
        print("search: no time was left for held-out text; a larger --budget goes on from here")
    else:
        print("\n".join(table(read)))
        print(f"best on {len(read[0]['pieces'])} held-out pieces: {read[0]['name']}")
        print(read[0]["call"])
    in_configs = {each.name: each for each in finalists if each.method not in SCORES}
    names = [row["name"] for row in read if row["name"] in in_configs]
    # Without held-out text the best on the searched ones: it comes after YaRN, if it is another.
    best = in_configs[names[0]] if names else list(in_configs.values())[:-1][:2][-1]
    write_config(looking.model, best, looking.rows.results["length"], folder / "extended")


def summary(
    candidate: Candidate,
    pieces: Sequence[dict[str, Any]],
    of_yarn: Sequence[dict[str, Any]],
    counts: str,
) -> dict[str, Any]:
    """Return a finalist's row of its measurements.

    Losses differ more between pieces than between methods. So each finalist is compared piece by
    piece with YaRN with its paper's factor.
    """
    row: dict[str, Any] = {
        "name": candidate.name,
        "method": candidate.method,
        "params": candidate.params,
        "call": candidate.call,
        "pieces": [piece[counts] for piece in pieces],
    }
    if pieces:
        both = zip(pieces, of_yarn, strict=False)
        numbers = {name: [piece[name] for piece in pieces] for name in NUMBERS}
        numbers["to_yarn"] = [piece[counts] - yarn[counts] for piece, yarn in both]
        for name, values in numbers.items():
            row[name], row[f"{name}_error"] = report.mean_and_error(values)
    return row


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    lines = ["".join(f"{head:>14} " for head in _COLUMNS) + " method"]
    for row in rows:
        cells = (
            report.with_error(row[name], row[f"{name}_error"], 3) for name in _COLUMNS.values()
        )
        lines.append("".join(f"{cell:>14} " for cell in cells) + f" {row['name']}")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the finalists' losses, compared with YaRN's, as PNG."""
    figure = plots.new_figure(8.5, 3.6)
    axes = figure.subplots()
    rows = [row for row in reversed(results["finalists"]) if row["pieces"]]
    for place, row in enumerate(rows):
        axes.errorbar(row["to_yarn"], place, xerr=row["to_yarn_error"], fmt="oC0", capsize=3)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.axvline(0, color="0.35", linewidth=0.8)
    # The plain model may be nats behind, while the others differ by hundredths.
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel(f"{results['objective']}, to YaRN's (nats a token; 0 is YaRN)")
    axes.grid(axis="x", color="0.88")
    held_out = ", ".join(text["name"] for text in results["held_out"])
    figure.suptitle(f"{results['model']}, {results['length']:,} tokens of {held_out}")
    plots.save_figure(figure, path)


def write_config(model: PreTrainedModel, best: Candidate, length: int, folder: Path) -> None:
    """Write the configuration, without weights, of the model extended by a frequency method."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # it describes the GGUF file, not the loaded weights
    if best.method == "plain":
        config.save_pretrained(folder)
        (folder / SAVED).unlink(missing_ok=True)  # of an earlier search with a smaller budget
    else:
        with torch.device("meta"):
            shell = type(model)(config)
        longest = max(length, models.unscaled_length(model))
        with best.extending(shell) as handle:
            handle.save_pretrained(folder, length=longest, state_dict={})
    print(f"{folder / 'config.json'}: {best.name}")
