"""Write the README's figures from measured files: python bench/readme.py

Reads bench/results/*.json (from `make bench` and bench/length_generalization.py) and
build/demo/loss.json with its plot (from `make demo`); replaces what stands between the markers in
README.md, and docs/demo.png. The marker of bench/results/NAME-DEVICE.json is NAME-DEVICE, of the
demo demo-table: put

    <!-- rope-cpu -->

where its figures shall stand. Files without a marker are named and left out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import bench_overhead
import length_report
import method_table
from audit.summary import table as audit_table
from harness import COLUMNS, RESULTS, cell
from scaling import summary

ROOT = Path(__file__).parent.parent


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_table(results: dict) -> str:
    rows = results["rows"]
    head = ["method", *(f"{b['start'] // 1024}-{b['stop'] // 1024}k" for b in rows[0]["buckets"])]
    lines = [[f"`{row['method']}`", *(f"{b['loss']:.2f}" for b in row["buckets"])] for row in rows]
    seconds = sum(row["seconds"] for row in rows)
    took = f"The {len(rows)} runs took {seconds / 60:.1f} minutes on 2 cores."
    return f"{table(head, lines)}\n\n{took}"


def machine(results: dict) -> str:
    where = results["machine"]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}"


def comparison(results: dict) -> str:
    """A line for each case, with our time over that of everyone else."""
    fields = ("dtype", "shape", "milliseconds", "of_floor", "error", "host_microseconds",
              "megabytes")  # fmt: skip
    headings = [COLUMNS[field][0].replace("/it", "/ours") for field in fields]
    lines, absent = [], {}
    cases: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        cases.setdefault((row["case"], row["dtype"], row["shape"]), []).append(row)
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
    text = f"{row['implementation']} {row['ratio']:.2f}"
    if "bar" not in row:
        return text
    bar = f"(bar {row['bar']:.3g})" if row["verdict"] == "met" else f"(bar {row['bar']:.3g} missed)"
    return f"{text} {bar}"


def length_table(results: dict) -> str:
    """Names link to papers; bold is what no method beats by much."""
    rows = results["rows"]
    best = [min(column) for column in zip(*map(length_report.losses, rows))]
    lines = []
    for row in rows:
        numbers = [
            f"**{loss:.2f}**" if loss < least + 0.05 else f"{loss:.2f}"
            for loss, least in zip(length_report.losses(row), best)
        ]
        name = f"[{row['name']}]({row['paper']})"
        lines.append([name, row["trained"], row["run"], *numbers])
    bold = "Nats per byte; bold: within 0.05 of the best of its column."
    return f"{table(length_report.head(results), lines)}\n\n{bold} {length_report.summary(results)}"


def methods_table(length: dict, demo: dict | None) -> str:
    head = ["function", "what it does", "source", "tests", "small model, 8x", "SmolLM2, 14-16k"]
    return table(head, method_table.rows(length, demo))


def overhead(results: dict) -> str:
    columns = bench_overhead.COLUMNS
    lines = [[cell(row.get(field), form) for field, (_, _, form) in columns.items()]
             for row in results["rows"]]  # fmt: skip
    return f"{machine(results)}.\n\n{table([head for head, _, _ in columns.values()], lines)}"


def growth(results: dict) -> str:
    """The slopes of a scaling plot."""
    slopes = "\n".join(f"- {line}" for line in summary(results["rows"]))
    return f"{results['about']}; {machine(results)}.\n\n{slopes}"


def text_of(path: Path) -> str:
    """What a file of results has to say."""
    results = json.loads(path.read_text())
    if path.stem.startswith("scaling-"):
        return f"![{path.stem}](bench/results/{path.stem}.svg)\n\n{growth(results)}"
    named = {"overhead": overhead, "length_generalization": length_table}
    return named.get(path.stem.rsplit("-", 1)[0], comparison)(results)


def replace(text: str, name: str, content: str | Callable[[], str]) -> str:
    """The text with the content between the markers of that name; unchanged without a marker."""
    if f"<!-- {name} -->" not in text:
        print(f"no marker <!-- {name} --> in the README")
        return text
    content = content if isinstance(content, str) else content()
    marked = f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"
    pattern = rf"<!-- {name} -->(?:.*<!-- end of {name} -->)?"
    return re.sub(pattern, lambda _: marked, text, count=1, flags=re.DOTALL)


def main(root: Path = ROOT, results: Path = RESULTS) -> None:
    readme = root / "README.md"
    text = readme.read_text()
    for path in sorted(results.glob("*-c*.json")):  # -cpu and -cuda
        text = replace(text, path.stem, lambda path=path: text_of(path))
    if (audit := results / "gpu_audit.json").exists():
        text = replace(text, "audit-table", audit_table(audit))
    if (made := root / "build" / "demo" / "loss.json").exists():
        (root / "docs").mkdir(exist_ok=True)
        shutil.copyfile(made, results / "demo.json")
        shutil.copyfile(made.with_suffix(".png"), root / "docs" / "demo.png")
    demo = json.loads(path.read_text()) if (path := results / "demo.json").exists() else None
    if demo:
        text = replace(text, "demo-table", demo_table(demo))
    if (path := results / "length_generalization-cpu.json").exists():
        text = replace(text, "methods-table", methods_table(json.loads(path.read_text()), demo))
    readme.write_text(text)


if __name__ == "__main__":
    main()
