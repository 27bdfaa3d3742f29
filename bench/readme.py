"""Write the README's figures from measured files: python bench/readme.py

Reads bench/results/rope-cpu.json (from `make bench`) and build/demo/loss.json with its plot (from
`make demo`); replaces what stands between the markers in README.md and docs/demo.png.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_table(results: dict) -> str:
    rows = results["rows"]
    head = ["method", *(f"{b['start'] // 1024}-{b['stop'] // 1024}k" for b in rows[0]["buckets"])]
    lines = [[f"`{row['method']}`", *(f"{b['loss']:.2f}" for b in row["buckets"])] for row in rows]
    seconds = sum(row["seconds"] for row in rows)
    return f"{table(head, lines)}\n\nThe five runs took {seconds / 60:.1f} minutes on 2 cores."


def bench_table(results: dict) -> str:
    rows, machine = results["rows"], results["machine"]
    large = [row for row in rows if row["against"] in ("clone", "copy_")]
    peers = [row for row in rows if row["case"].startswith("transformers")]
    host = [row for row in rows if row["layout"] == "1 token"]
    parts = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"q {tuple(results['shape'])}, k with {results['heads_k']} heads; medians in one run.",
        table(
            ["", "dtype", "layout", "ms", "against", "ratio", "error against float64"],
            [
                [
                    row["case"],
                    row["dtype"],
                    row["layout"],
                    f"{row['milliseconds']:.1f}",
                    f"`{row['against']}` of q and k",
                    f"{row['ratio']:.2f}",
                    f"{row['error']:.1e}",
                ]
                for row in large
            ],
        ),
        table(
            ["peer", "dtype", "ms", "its time over", "ratio", "its error"],
            [
                [
                    row["case"],
                    row["dtype"],
                    f"{row['milliseconds']:.0f}",
                    row["against"],
                    f"{row['ratio']:.1f}",
                    f"{row['error']:.1e}",
                ]
                for row in peers
            ],
        ),
        table(
            ["one token, q (1, 1, 32, 128), k with 8 heads", "microseconds a call"],
            [[row["case"], f"{row['host_microseconds']:.1f}"] for row in host],
        ),
    ]
    return "\n\n".join(parts)


def replace(text: str, name: str, content: str) -> str:
    marked = f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"
    pattern = rf"<!-- {name} -->(?:.*<!-- end of {name} -->)?"
    return re.sub(pattern, lambda _: marked, text, count=1, flags=re.DOTALL)


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    if bench := read(ROOT / "bench" / "results" / "rope-cpu.json"):
        text = replace(text, "bench-table", bench_table(bench))
    if demo := read(ROOT / "build" / "demo" / "loss.json"):
        text = replace(text, "demo-table", demo_table(demo))
        (ROOT / "docs").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "build" / "demo" / "loss.png", ROOT / "docs" / "demo.png")
    readme.write_text(text)


if __name__ == "__main__":
    main()
