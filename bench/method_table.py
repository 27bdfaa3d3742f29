"""The table of methods: name, one line and paper from each docstring, and what was measured.

A method's docstring starts with its one line and names its source at the end:

    Paper: https://arxiv.org/abs/2309.00071
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import smollm2_table

import extrope_kernels
from extrope_kernels import methods, positions, scores

RESULTS = Path(__file__).parent / "results"
# What rows of the measurements are called, where it is not the method's name.
MEASURED_AS = {
    "abf": "abf, tuned",
    "blockwise_causal": "xpos, blockwise (LEX)",
    "permuteformer_attention": "permuteformer",
}


class MethodRow(NamedTuple):
    axis: str  # "frequencies", "scores", "positions"; "permutations" in place of a rotation
    name: str  # as users write it
    what: str  # one line
    paper: str  # a link
    trained: float | None  # loss of a small model at 8 times its training length
    real: smollm2_table.Measured | None  # on SmolLM2, with the best parameters that were tried
    at_four: smollm2_table.Measured | None = None  # likewise, at four times the length


def method_rows(results: Path = RESULTS) -> list[MethodRow]:
    """Every method of every axis, in the order of its registry."""
    trained = _losses(
        results / "length_generalization-cpu.json",
        "name",
        lambda row: statistics.fmean(row["lengths"][-1]["last"]),
    )
    folders = (smollm2_table.TWICE, smollm2_table.FOUR_TIMES)
    real = [smollm2_table.measured(results, folder) for folder in folders]
    rows = []
    for axis, name, method in _methods():
        measured = MEASURED_AS.get(method.__name__, method.__name__)
        best = [smollm2_table.best(found[name]) if name in found else None for found in real]
        rows.append(MethodRow(axis, name, *described(method), trained.get(measured), *best))
    return rows


def described(method: Callable) -> tuple[str, str]:
    """The first line of a docstring without its full stop, and the link to its source."""
    text = inspect.getdoc(method) or ""
    source = re.search(r"^(?:Paper|Source): (https://\S+)", text, re.MULTILINE)
    if source is None:
        raise ValueError(f"{method.__name__}: the docstring must hold a line 'Paper: https://...'")
    return text.splitlines()[0].removesuffix("."), source[1]


def link(paper: str) -> str:
    """Markdown: an arXiv paper by its number, anything else by its host."""
    host, path = urlsplit(paper)[1:3]
    label = Path(path).name if host == "arxiv.org" else host.removeprefix("www.")
    return f"[{label}]({paper})"


def table_lines(results: Path) -> list[list[str]]:
    """The cells of `method_rows`, in Markdown."""
    lines = []
    for row in method_rows(results):
        of_real = ["", "", "", ""]
        between = smollm2_table.between
        if row.real is not None:
            of_real[0] = smollm2_table.named(row.real.parameters)
            of_real[1:3] = between(row.real.over_yarn, 3), between(row.real.recall)
        if row.at_four is not None:
            of_real[3] = between(row.at_four.over_yarn, 3)
        lines.append([f"`{row.name}`", row.what, link(row.paper), _number(row.trained), *of_real])
    return lines


def api(folder: str) -> str:
    """mkdocstrings' directive for every public function of a folder, such as "methods"."""
    paths = {}
    for package in (extrope_kernels, methods, positions, scores):
        for name in package.__all__:
            value = getattr(package, name)
            if getattr(value, "__module__", "").startswith(f"extrope_kernels.{folder}."):
                at = "extrope_kernels" if package is extrope_kernels else value.__module__
                paths.setdefault(name, f"::: {at}.{name}")
    return "\n".join(paths.values())


def _methods() -> list[tuple[str, str, Callable]]:
    frequencies = methods.METHODS | methods.WRAPPERS
    strategies = {name: getattr(positions, name) for name in positions.__all__}
    return [
        *(("frequencies", name, method) for name, method in frequencies.items()),
        *(("scores", name, method) for name, method in scores.SCORES.items()),
        ("permutations", "permuteformer_attention", extrope_kernels.permuteformer_attention),
        *(("positions", f"positions.{name}", method) for name, method in strategies.items()),
    ]


def _losses(path: Path, key: str, loss: Callable[[dict], float]) -> dict[str, float]:
    if not path.exists():
        return {}
    return {row[key]: loss(row) for row in json.loads(path.read_text())["rows"]}


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.2f}"
