"""Run a search; print, draw and write its results on held-out text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...methods import METHODS
from .. import UsageError, models, options, report
from ..digests import model_digest
from ..models import training_length
from ..plots import available, new_figure, save_figure
from ..report import mean_and_error, with_error
from ..texts import Text, read_text, read_texts, source
from .candidates import Candidate
from .factors import find_ladder, write_config
from .pieces import OBJECTIVES, SHORTEST
from .stages import Ledger, Search

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16")
_ROWS = 60  # a guess of the number of measurements, for the progress bar
_NUMBERS = ("loss", "whole", "again", "recall")  # the numbers of a measurement


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
    frequencies, into `out`. The same call continues an interrupted search, and a call with a
    larger budget continues a finished one.

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
        raise UsageError(f"length must be >= {SHORTEST}, got {length}")
    if not budget > 0:
        raise UsageError(f"budget must be > 0, got {budget:g}")
    for name, value, known in (("objective", objective, OBJECTIVES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, got {value}")
    folder = options.check_out(str(out))
    files, on = models.prepared(model, device)
    print(f"loading {model}", file=sys.stderr, flush=True)
    with report.telling(lambda: f"loading {model}"):
        tokenizer = models.load_tokenizer(files)
        names = [texts] if isinstance(texts, str) else texts
        to_search, decides = split_texts(tokenizer, names, held_out, length)
        loaded = models.load_model(files, dtype, on)
        models.keep_converted(model, files, loaded, tokenizer)
    if held_out is None:
        print("search: the first half of each text is searched on, the second decides", flush=True)
    settings = {
        "task": "search",
        "model": Path(model).name,
        "model_digest": model_digest(loaded),
        "dtype": dtype,
        "length": length,
        "objective": objective,
        "texts": [text.about() for text in to_search],
        "held_out": [text.about() for text in decides],
        "seed": seed,
    }
    return search_model(loaded, to_search, decides, settings, 60 * budget, folder)


def split_texts(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], held_out: str | None, length: int
) -> tuple[list[Text], list[Text]]:
    """Return the texts to search on and those to decide on; they have no token in common.

    Raises UsageError if a part has fewer than `length` tokens, if a text is given twice, or if a
    text is for both.
    """
    if held_out is not None and source(held_out) in map(source, names):
        raise UsageError(f"--held-out {held_out}: is searched on, too")
    whole = read_texts(tokenizer, names)
    if held_out is not None:
        texts, decides = whole, [read_text(tokenizer, held_out, "--held-out")]
        if decides[0].digest in [text.digest for text in texts]:
            raise UsageError(f"--held-out {held_out}: is searched on, too")
    else:
        halves = [text.halves() for text in whole]
        texts, decides = [first for first, _ in halves], [second for _, second in halves]
    for text in (*texts, *decides):
        if text.tokens < length:
            raise UsageError(
                f"{text.name}: {text.tokens:,} tokens, too short for a length of {length:,}"
            )
    return texts, decides


def search_model(
    model: PreTrainedModel,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    settings: dict[str, Any],
    budget: float,
    out: Path,
) -> dict[str, Any]:
    """Search with a loaded model; show, write and return the results.

    settings: settings that results depend on, for the head of search.json. budget: seconds.
    """
    ladder = find_ladder(model, training_length(model))
    header = settings | {
        "training_length": ladder.trained,
        "device": str(model.device),
        "versions": report.versions(),
        "rows": [],
    }
    ledger = Ledger(out / "search.json", header, budget)
    print(f"measuring for {budget / 60:g} minutes into {out}", file=sys.stderr, flush=True)
    model.requires_grad_(False)
    length, objective, seed = (settings[name] for name in ("length", "objective", "seed"))
    with report.open_display(sys.stdout, _ROWS) as display:
        found = Search(model, ladder, texts, held_out, length, objective, seed, ledger, display)
        finalists = found.run()
    rows = summarise(finalists, [found.on_held_out(each) for each in finalists], found.counts)
    frequencies = [each for each in finalists if each.method in (*METHODS, "plain")]
    ledger.results |= {
        "finalists": rows,
        "factors": {
            each.name: ladder.log_factors(ladder.freqs(each)).exp().tolist() for each in frequencies
        },
        "seconds": round(ledger.spent, 1),
    }
    ledger.write()
    if available():
        plot(ledger.results, out / "search.png")
    _print_best(rows)
    chosen = _best_frequencies(rows, frequencies)
    write_config(model, ladder, chosen, length, out / "extended")
    print(f"{out / 'extended' / 'config.json'}: {chosen.name}")
    return ledger.results


def _print_best(rows: list[dict[str, Any]]) -> None:
    if not rows[0]["pieces"]:
        print("search: no time was left for held-out text; a larger --budget goes on from here")
        return
    print("\n".join(table(rows)))
    best = rows[0]
    print(f"best on {len(best['pieces'])} held-out pieces: {best['name']}")
    if any(isinstance(value, list) for value in best["params"].values()):  # too long for one line
        print(f'extend(model, "{best["method"]}", **params), of its row in search.json')
    else:
        print(best["call"])


def _best_frequencies(rows: list[dict[str, Any]], frequencies: list[Candidate]) -> Candidate:
    """Return the best finalist that a configuration can hold; score methods need `extend`."""
    by_name = {each.name: each for each in frequencies}
    for row in rows:
        if row["name"] in by_name and row["pieces"]:
            return by_name[row["name"]]
    return frequencies[-2]  # the last before plain: the best published method on the searched texts


def summarise(
    candidates: Sequence[Candidate], measured: Sequence[Sequence[dict[str, Any]]], counts: str
) -> list[dict[str, Any]]:
    """Return a row for each finalist, the best first.

    Losses differ more between pieces than between methods. So each finalist is compared piece by
    piece with the first one, YaRN with its paper's factor.
    """
    found = []
    for candidate, pieces in zip(candidates, measured, strict=True):
        row: dict[str, Any] = {
            "name": candidate.name,
            "method": candidate.method,
            "params": candidate.params,
            "call": candidate.call,
            "pieces": [piece[counts] for piece in pieces],
        }
        both = list(zip(pieces, measured[0], strict=False))
        if both:
            numbers = {name: [piece[name] for piece in pieces] for name in _NUMBERS}
            numbers["to_yarn"] = [piece[counts] - yarn[counts] for piece, yarn in both]
            for name, values in numbers.items():
                row[name], row[f"{name}_error"] = mean_and_error(values)
        found.append(row)
    return sorted(found, key=lambda row: row.get("to_yarn", float("inf")))


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    columns = {"last quarter": "loss", "to yarn": "to_yarn", "whole": "whole", "recall": "recall"}
    lines = ["".join(f"{head:>14} " for head in columns) + " method"]
    for row in (row for row in rows if row["pieces"]):
        cells = (with_error(row[name], row[f"{name}_error"], 3) for name in columns.values())
        lines.append("".join(f"{cell:>14} " for cell in cells) + f" {row['name']}")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the finalists' losses and the factors of their pairs, as PNG."""
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    rows = [row for row in results["finalists"] if row["pieces"]]
    for place, row in enumerate(reversed(rows)):
        left.errorbar(
            row["to_yarn"], place, xerr=row["to_yarn_error"], fmt="o", color="#0072B2", capsize=3
        )
    left.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    left.axvline(0, color="0.35", linewidth=0.8)
    # The plain model may be nats behind, while the others differ by hundredths.
    left.set_xscale("symlog", linthresh=0.1)
    left.set_xlabel(f"{results['objective']}, to YaRN's (nats a token; 0 is YaRN)")
    for name, factors in results["factors"].items():
        right.plot(factors, marker=".", label=name)
    right.set_xlabel("pair, from the fastest")
    right.set_ylabel("factor: RoPE's frequency over this one")
    right.set_yscale("log", base=2)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.88")
    held_out = ", ".join(text["name"] for text in results["held_out"])
    figure.suptitle(f"{results['model']}, {results['length']:,} tokens of {held_out}")
    save_figure(figure, path)
