"""Write the figures of README.md and docs/ from measured files: python bench/readme.py [--check]

A page has a figure between two markers:

    <!-- avx512/rope: bfloat16 -->
    <!-- end of avx512/rope -->

Here these are the cases of bench/results/avx512/rope.json with "bfloat16" in their name, dtype or
shape; several words must all be there. `figures` lists all figures; tables.py makes them, plots.py
draws. First it keeps the results of `make demo` in build/. --check writes nothing, and
fails if a page is stale.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import evaluations
import tables
from harness import RESULTS

ROOT = Path(__file__).parent.parent
EVERY = (
    "Made by `python bench/readme.py` from the files in the folder of this name. A column that is "
    "named after another implementation says how many times as fast ours is: more is better."
)
REAL = ("smollm2-16k", "smollm2-32k", "gemma3-270m-48k")
# By name a function of the content of bench/results/models/NAME.json.
TABLES = {
    "census": tables.census,
    "demo": tables.demo,
    "length_generalization": tables.length_generalization,
    "recall": tables.recall,
    "short": tables.within,
}


def measured(results: Path) -> dict[str, Path]:
    """Return the files of benchmarks by marker: PROCESSOR/NAME."""
    found = {f"{path.parent.name}/{path.stem}": path for path in sorted(results.glob("*/*.json"))}
    return {name: path for name, path in found.items()
            if not name.startswith((f"{evaluations.FOLDER}/", "gpu-"))}  # fmt: skip


def figures(results: Path) -> dict[str, Callable[[str], str]]:
    """Return the figures by name, each a function of the words after it."""
    made = {name: partial(tables.benchmark, path) for name, path in measured(results).items()}
    for name, make in TABLES.items():
        made[name] = lambda _, name=name, make=make: make(evaluations.read(name, results))
    for name in REAL:
        made[name] = lambda _, name=name: tables.real(results, name)
    needles = results / "ruler" / "smollm2.csv"
    return made | {
        "helps": lambda _: tables.helps(results),
        "smollm2-64k": lambda _: tables.by_position(results, "smollm2-64k"),
        "smollm2-tuned": lambda _: tables.tuned(results),
        "gpu_audit": lambda _: tables.audit(results / "gpu_audit.csv"),
        "ruler": lambda _: tables.ruler_shares(needles),
        "ruler_tasks": lambda _: tables.ruler_tasks(needles.parent),
        "ruler_command": partial(tables.ruler_command, needles),
        "methods": partial(tables.method_table, results),
    }


def pages(root: Path) -> list[Path]:
    """List the pages that may have figures."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(page: Path, made: dict[str, Callable[[str], str]]) -> str:
    """Return the page's text with today's figures between its markers."""

    def marked(marker: re.Match) -> str:
        name, only = marker["name"], marker["only"] or ""
        if name not in made:
            raise ValueError(f"{page.name}: nothing measured is called {name!r}")
        return f"{marker['start']}\n{made[name](only)}\n<!-- end of {name} -->"

    pattern = (
        r"(?P<start><!-- (?P<name>[\w/-]+)(?:: (?P<only>[^\n]*?))? -->)\n"
        r"(?:(?!<!-- ).)*<!-- end of (?P=name) -->"
    )
    return re.sub(pattern, marked, page.read_text(), flags=re.DOTALL)


def everything(results: Path, processor: str) -> str:
    """Make a page of all benchmarks of a processor, a section each."""
    parts = [f"# Every figure: {processor}", EVERY]
    for name, path in measured(results).items():
        if name.startswith(f"{processor}/"):
            parts.append(f"## {path.stem}")
            # A table a score method: together their rivals are too many columns for a screen.
            rows = json.loads(path.read_text())["rows"] if path.stem == "attention" else []
            kinds = dict.fromkeys(row["case"].split(" ")[0] for row in rows) or [""]
            parts += [tables.benchmark(path, kind) for kind in kinds]
    return "\n\n".join(parts) + "\n"


def stale(root: Path = ROOT, results: Path = RESULTS) -> dict[Path, str]:
    """Return the pages that differ from the measured files, with their new text."""
    made = figures(results)
    texts = {page: filled(page, made) for page in pages(root)}
    for processor in {path.parent.name for path in measured(results).values()}:
        texts[results / f"{processor}.md"] = everything(results, processor)
    return {page: text for page, text in texts.items()
            if not page.exists() or page.read_text() != text}  # fmt: skip


def keep(root: Path, results: Path) -> None:
    """Keep the results of `make demo` in build/."""
    build = root / "build"
    for task, name, kind in (("loss", "demo", "demo"), ("recall", "recall", "gains")):
        if (found := build / "demo" / f"{task}.json").exists():
            evaluations.keep(found, name, kind, results)


def main(root: Path = ROOT, results: Path = RESULTS, check: bool = False) -> int:
    if not check:
        keep(root, results)
    found = stale(root, results)
    for page, text in found.items():
        print(os.path.relpath(page, root))
        if not check:
            page.write_text(text)
    return int(check and bool(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if one is stale")
    sys.exit(main(check=parser.parse_args().check))
