"""What `eval` measured, in Markdown."""

from __future__ import annotations

from harness import table


def demo_table(results: dict) -> str:
    rows = results["rows"]
    head = ["method", *(f"{b['start'] // 1024}-{b['stop'] // 1024}k" for b in rows[0]["buckets"])]
    lines = [[f"`{row['method']}`", *(f"{b['loss']:.2f}" for b in row["buckets"])] for row in rows]
    seconds = sum(row["seconds"] for row in rows)
    threads = results["threads"]
    on = "a thread" if threads == 1 else f"{threads} threads"
    took = f"The {len(rows)} runs took {seconds / 60:.1f} minutes of {on}."
    return f"{table(head, lines)}\n\n{took}"


def recall_table(results: dict) -> str:
    """A line a method: what a passage gains by distance, with its standard error."""
    head = ["method", *(f"{distance:,}" for distance in results["distances"])]
    lines = [
        [f"`{row['method']}`", *(f"{g['gain']:.2f} ± {g['error']:.2f}" for g in row["gains"])]
        for row in results["rows"]
    ]
    return table(head, lines)


def passkey_table(results: dict) -> str:
    """A line a length of each method, a column a depth: shares with Wilson's interval of 95%."""
    head = ["method", "tokens", *(f"{depth:.0%} deep" for depth in results["depths"])]
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    lines = []
    for row in sorted(results["rows"], key=lambda r: (methods.index(r["method"]), r["length"])):
        shares = [
            f"{share:.0%} ({100 * low:.0f}-{100 * high:.0f})"
            for share, (low, high) in zip(row["accuracy"], row["intervals"], strict=True)
        ]
        lines.append([f"`{row['method']}`", f"{row['length']:,}", *shares])
    return table(head, lines)
