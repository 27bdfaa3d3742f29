"""Write the figures of README.md and docs/ from measured files: python bench/readme.py

Reads bench/results/*.json (of `make bench`, bench/gpu_audit.py and bench/length_generalization.py)
and build/demo/ with its plots (of `make demo`), which it keeps as bench/results/{demo,recall}.json
and docs/{demo,recall}.png; likewise build/search*/ (--out of `search`), by length. All of it goes
to bench/results/README.md, and between the markers of a page,

    <!-- rope-cpu: bfloat16 -->
    <!-- end of rope-cpu -->

what bench/results/rope-cpu.json says; here only the cases with "bfloat16" in their name, dtype or
shape; several words must all be there. FOLDER/rope-cpu is another machine's (--out FOLDER);
`methods` is the table of methods, `smollm2`, `smollm2-32k` and `gemma3-270m-48k` those of real
models, `tuned` that of fine-tunes, `models` that of bench/models_census.py, `gpu_audit` and
`triton_versions` the audit's, `demo` and `recall` the demo's, `passkey` that of
bench/model_runs.py, whose plot is copied as well, `search-16k` a search's, `searched` the best of
all searches, and `api: scores` what mkdocstrings is to show of that folder.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import bench_distributed
import bench_generate
import bench_overhead
import length_report
import method_table
import models_table
import search_table
import smollm2_table
import smollm2_tuned
import triton_versions
from audit.summary import table as audit_table
from eval_tables import demo_table, passkey_table, recall_table
from harness import COLUMNS, RESULTS, cell, table
from scaling import summary

ROOT = Path(__file__).parent.parent


def search_figures(results: Path) -> dict[str, Callable[[str], str]]:
    """The finalists of each search, and the best of all of them by length."""
    head = ["", "last quarter", "to YaRN", "whole text"]

    def one(search: dict) -> str:
        return f"{table(head, search_table.table_lines(search))}\n\n{search_table.about(search)}"

    made = {
        name: lambda only, search=search: one(search)
        for name, search in search_table.found(results).items()
    }
    return made | ({"searched": lambda only: table(*search_table.by_kind(results))} if made else {})


def machine(results: dict) -> str:
    where = results["machine"]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}"


def comparison(results: dict, only: str = "") -> str:
    """A line for each case with the words of `only`, with our time over that of everyone else."""
    fields = ("dtype", "shape", "milliseconds", "of_floor", "error", "host_microseconds",
              "megabytes")  # fmt: skip
    headings = [COLUMNS[field][0].replace("/it", "/ours") for field in fields]
    lines, absent = [], {}
    cases: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        name = row["case"], row["dtype"], row["shape"]
        if all(word in " ".join(name) for word in only.split()):
            cases.setdefault(name, []).append(row)
    for rows in cases.values():
        for ours in (row for row in rows if row["implementation"] == "extrope"):
            words = [cell(ours.get(field), COLUMNS[field][2]) for field in fields]
            others = [row for row in rows if row["implementation"] != "extrope"]
            measured = [against(row) for row in others if "ratio" in row]
            lines.append([ours["case"], *words, "; ".join(measured)])
            absent |= {r["implementation"]: r["absent"] for r in others if "absent" in r}
    parts = [f"{machine(results)}; medians in one run.",
             table(["", *headings, "our time over theirs"], lines)]  # fmt: skip
    if absent:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        parts.append(f"Not measured here: {reasons}.")
    return "\n\n".join(parts)


def against(row: dict) -> str:
    """Whom we are compared with, our time over theirs, and how that stands to the bar."""
    ratio = row["ratio"]
    text = f"{row['implementation']} {ratio:.{2 if ratio >= 0.1 else 3}f}"
    if "bar" not in row:
        return text
    bar = f"(bar {row['bar']:.3g})" if row["verdict"] == "met" else f"(bar {row['bar']:.3g} missed)"
    return f"{text} {bar}"


def length_table(results: dict) -> str:
    """Names link to papers; bold is what the seeds don't tell from the best."""
    rows = results["rows"]
    best = [min(column, key=statistics.fmean) for column in zip(*map(length_report.losses, rows))]
    lines = []
    for row in rows:
        numbers = []
        for loss, least in zip(length_report.losses(row), best):
            text = length_report.with_spread(loss)
            numbers.append(f"**{text}**" if length_report.as_good(loss, least) else text)
        name = f"[{row['name']}]({row['paper']})"
        lines.append([name, row["trained"], row["run"], *numbers])
    bold = (
        "Nats per byte; bold: at most 0.01, or twice the standard deviation of the difference seed "
        "by seed, over the best of its column."
    )
    return f"{table(length_report.head(results), lines)}\n\n{bold} {length_report.summary(results)}"


def methods_table(results: Path) -> str:
    head = ["method", "what it does", "paper", "small model, 8x"]
    head += ["SmolLM2 with", "loss over YaRN", "recall", "over YaRN, 4x"]
    return table(head, method_table.table_lines(results))


def smollm2(results: Path, folder: str) -> str:
    head = ["method", "parameters", "loss", "over YaRN", "recall, 15,360 back"]
    lines = smollm2_table.table_lines(results, folder)
    columns = len(head) if any(line[-1] for line in lines) else len(head) - 1
    return table(head[:columns], [line[:columns] for line in lines])


def tuned(results: Path) -> str:
    head = ["method", "parameters"]
    for tokens in ("0-8k", "8-16k"):
        head += [f"loss, {tokens}", "tuned", "change"]
    head += ["recall, 15,360 back", "tuned"]
    return table(head, smollm2_tuned.table_lines(results))


def by_columns(columns: dict, results: dict) -> str:
    """A line for each row, with the benchmark's own columns."""
    lines = [[cell(row.get(field), form) for field, (_, _, form) in columns.items()]
             for row in results["rows"]]  # fmt: skip
    return f"{machine(results)}.\n\n{table([head for head, _, _ in columns.values()], lines)}"


def launches(results: dict) -> str:
    """Of the host up to a launch, in bare ones."""
    head = ["", "us", "bare launches", "at most", "kernels"]
    fields = {"microseconds": ".1f", "launches": ".1f", "bar": ".0f", "kernels": ".0f"}
    lines = [
        [row["name"], *(cell(row.get(field), form) for field, form in fields.items())]
        for row in results["rows"]
    ]
    return f"{machine(results)}, Triton {results['triton']}.\n\n{table(head, lines)}"


def growth(results: dict) -> str:
    """The slopes of a scaling plot."""
    slopes = "\n".join(f"- {line}" for line in summary(results["rows"]))
    return f"{results['about']}; {machine(results)}.\n\n{slopes}"


def text_of(path: Path, name: str, only: str = "") -> str:
    """What a file of results has to say; `name` is that of its marker."""
    results = json.loads(path.read_text())
    if path.stem.startswith("scaling-"):
        return f"![{name}](bench/results/{name}.svg)\n\n{growth(results)}"
    named = {
        "overhead": functools.partial(by_columns, bench_overhead.COLUMNS),
        "distributed": functools.partial(by_columns, bench_distributed.COLUMNS),
        "generate": functools.partial(by_columns, bench_generate.COLUMNS),
        "length_generalization": length_table,
        "launch": launches,
    }
    made = named.get(path.stem.rsplit("-", 1)[0])
    return made(results) if made else comparison(results, only)


def names(results: Path) -> dict[str, Path]:
    """Of the measured files, by marker: those of this machine first."""
    paths = sorted(results.rglob("*-c*.json"), key=lambda path: (len(path.parts), path))
    return {str(path.relative_to(results).with_suffix("")): path for path in paths}


def everything(results: Path) -> str:
    """All measured files, a section each."""
    parts = ["# Every figure", "Made by `python bench/readme.py` from the files beside this one."]
    for name, path in names(results).items():
        text = text_of(path, name).replace("](bench/results/", "](")
        parts.append(f"## {name}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def figures(results: Path) -> dict[str, Callable[[str], str]]:
    """What can stand between markers, by their name: a function of the words after it."""
    made = {name: functools.partial(text_of, path, name) for name, path in names(results).items()}
    made["methods"] = lambda only: methods_table(results)
    for folder in smollm2_table.FOLDERS:
        made[folder] = lambda only, folder=folder: smollm2(results, folder)
    made["tuned"] = lambda only: tuned(results)
    made["api"] = method_table.api
    if (audit := results / "gpu_audit.json").exists():
        made["gpu_audit"] = lambda only: audit_table(audit)
        made["triton_versions"] = lambda only: triton_versions.table()
    if (models := results / "models.json").exists():
        made["models"] = lambda only: models_table.table(models)
    if (demo := results / "demo.json").exists():
        made["demo"] = lambda only: demo_table(json.loads(demo.read_text()))
    if (recall := results / "recall.json").exists():
        made["recall"] = lambda only: recall_table(json.loads(recall.read_text()))
    if (passkey := results / smollm2_table.TWICE / "passkey.json").exists():
        made["passkey"] = lambda only: passkey_table(json.loads(passkey.read_text()))
    return made | search_figures(results)


def pages(root: Path) -> list[Path]:
    """Those that may have figures."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(page: Path, root: Path, made: dict[str, Callable[[str], str]]) -> str:
    """The page's text with today's figures between its markers."""
    here = os.path.relpath(root, page.parent)

    def marked(marker: re.Match) -> str:
        name, only = marker["name"], marker["only"] or ""
        if name not in made:
            raise ValueError(f"{page.name}: nothing measured is called {name!r}")
        figure = made[name](only)
        if here != ".":
            figure = figure.replace("](bench/", f"]({here}/bench/")
        return f"{marker['start']}\n{figure}\n<!-- end of {name} -->"

    pattern = (
        r"(?P<start><!-- (?P<name>[\w/-]+)(?:: (?P<only>[^\n]*?))? -->)\n"
        r"(?:(?!<!-- ).)*<!-- end of (?P=name) -->"
    )
    return re.sub(pattern, marked, page.read_text(), flags=re.DOTALL)


def keep_search(made: Path, root: Path, results: Path) -> None:
    """Keep what a search found, and its plot, without each of its measurements."""
    found = json.loads(made.read_text())
    del found["rows"]
    name = f"search-{found['length'] // 1024}k"
    (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.copyfile(made.with_suffix(".png"), root / "docs" / f"{name}.png")


def main(root: Path = ROOT, results: Path = RESULTS) -> None:
    for task, name in (("loss", "demo"), ("recall", "recall")):
        if (made := root / "build" / "demo" / f"{task}.json").exists():
            shutil.copyfile(made, results / f"{name}.json")
            shutil.copyfile(made.with_suffix(".png"), root / "docs" / f"{name}.png")
    if (drawn := results / smollm2_table.TWICE / "passkey.png").exists():
        shutil.copyfile(drawn, root / "docs" / drawn.name)
    for plot in (root / "build").glob("search*/search.png"):  # others have not ended
        keep_search(plot.with_suffix(".json"), root, results)
    for page in pages(root):
        page.write_text(filled(page, root, figures(results)))
    (results / "README.md").write_text(everything(results))


if __name__ == "__main__":
    main()
