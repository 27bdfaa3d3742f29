"""Write the README's figures from measured files: python bench/readme.py

Reads bench/results/*.json (from `make bench`) and build/demo/loss.json with its plot (from `make
demo`); replaces what stands between the markers in README.md, docs/demo.png and docs/rerope.svg.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from audit.summary import table as audit_table

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


def attention_table(results: dict) -> str:
    machine = results["machine"]
    head = ["", "dtype", "head_dim", "heads", "N", "ms", "against", "ratio", "bar", "error"]
    lines = [
        [
            row["case"],
            row["dtype"],
            str(row["head_dim"]),
            row["heads"],
            str(row["seqlen"]),
            f"{row['milliseconds']:.1f}",
            row["against"],
            f"{row['ratio']:.2f}",
            f"{row['bar']:.2f}",
            f"{row['error']:.1e}",
        ]
        for row in results["rows"]
    ]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"{where}; medians in one run.\n\n{table(head, lines)}"


def plot_curve(rows: list[dict], path: Path) -> None:
    """Time and peak memory against length, of every implementation."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "extrope"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, field, label in zip(axes, ("milliseconds", "megabytes"), ("ms", "peak MB")):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            own = [row for row in rows if row["implementation"] == name]
            axis.plot([x["seqlen"] for x in own], [x[field] for x in own], "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


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
    if rerope := read(ROOT / "bench" / "results" / "rerope-cpu.json"):
        text = replace(text, "rerope-table", attention_table(rerope))
    if curve := read(ROOT / "bench" / "results" / "rerope_curve-cpu.json"):
        plot_curve(curve["rows"], ROOT / "docs" / "rerope.svg")
    if (audit := ROOT / "bench" / "results" / "gpu_audit.json").exists():
        text = replace(text, "audit-table", audit_table(audit))
    if demo := read(ROOT / "build" / "demo" / "loss.json"):
        text = replace(text, "demo-table", demo_table(demo))
        (ROOT / "docs").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "build" / "demo" / "loss.png", ROOT / "docs" / "demo.png")
    readme.write_text(text)


if __name__ == "__main__":
    main()
