"""Run a search; print, draw and write its results on held-out text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import UsageError, models, options, report
from ..digests import model_digest
from ..forward import after_each_layer
from ..plots import available, new_figure, save_figure
from ..report import mean_and_error, with_error
from ..texts import Text, check_tokens, read_text, read_texts
from .candidates import Candidate
from .config import find_site, write_config
from .pieces import OBJECTIVES, SHORTEST
from .stages import Ledger, Search

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        raise UsageError(f"--length must be >= {SHORTEST}, got {length}")
    if not budget > 0:
        raise UsageError(f"--budget must be > 0, got {budget:g}")
    options.check_choice("objective", objective, OBJECTIVES)
    options.check_choice("dtype", dtype, options.DTYPES)
    folder = options.check_out(Path(out))
    files, on = models.prepared(model, device)
    tokenizer = models.load_tokenizer(files)
    names = [texts] if isinstance(texts, str) else texts
    to_search, decides = split_texts(tokenizer, names, held_out, length)
    loaded = models.load_model(files, dtype, on)
    site = find_site(loaded)
    if held_out is None:
        print("search: the first half of each text is searched on, the second decides", flush=True)
    header = {
        "task": "search",
        "model": Path(model).name,
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
        "rows": [],
    }
    ledger = Ledger(folder / "search.json", header, 60 * budget)
    print(f"measuring for {budget:g} minutes into {out}", file=sys.stderr, flush=True)
    with (
        report.Display(sys.stdout, _ROWS) as display,
        after_each_layer(loaded, display.tick),
    ):
        pairs = site.dim(site.layer_types[0]) // 2
        looking = Search(
            loaded, pairs, to_search, decides, length, objective, seed, ledger, display
        )
        finalists = looking.run()
    measured = [looking.on_held_out(each) for each in finalists]
    rows = summarise(finalists, measured, looking.counts)
    ledger.results |= {"finalists": rows, "seconds": round(ledger.spent, 1)}
    ledger.write()
    if available():
        plot(ledger.results, folder / "search.png")
    _print_best(rows)
    best = _best_frequencies(rows, finalists)
    write_config(loaded, site, best, length, folder / "extended")
    print(f"{folder / 'extended' / 'config.json'}: {best.name}")
    return ledger.results


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


def _best_frequencies(rows: list[dict[str, Any]], finalists: list[Candidate]) -> Candidate:
    """Return the best finalist that a configuration can hold; score methods need `extend`."""
    frequencies = [each for each in finalists if not each.is_score]
    by_name = {each.name: each for each in frequencies}
    found = (by_name[row["name"]] for row in rows if row["name"] in by_name and row["pieces"])
    return next(found, frequencies[-2])  # the last before plain: best on the searched texts


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    columns = {"last quarter": "loss", "to yarn": "to_yarn", "whole": "whole", "recall": "recall"}
    lines = ["".join(f"{head:>14} " for head in columns) + " method"]
    for row in (row for row in rows if row["pieces"]):
        cells = (with_error(row[name], row[f"{name}_error"], 3) for name in columns.values())
        lines.append("".join(f"{cell:>14} " for cell in cells) + f" {row['name']}")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the finalists' losses, compared with YaRN's, as PNG."""
    figure = new_figure(8.5, 3.6)
    axes = figure.subplots()
    rows = [row for row in reversed(results["finalists"]) if row["pieces"]]
    for place, row in enumerate(rows):
        axes.errorbar(
            row["to_yarn"], place, xerr=row["to_yarn_error"], fmt="o", color="#0072B2", capsize=3
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.axvline(0, color="0.35", linewidth=0.8)
    # The plain model may be nats behind, while the others differ by hundredths.
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel(f"{results['objective']}, to YaRN's (nats a token; 0 is YaRN)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.88")
    held_out = ", ".join(text["name"] for text in results["held_out"])
    figure.suptitle(f"{results['model']}, {results['length']:,} tokens of {held_out}")
    save_figure(figure, path)
