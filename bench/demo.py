"""Show a real model past its training length in two pictures: python bench/demo.py, or make demo.

SmolLM2-135M reads the Python reference at twice its training length: its loss by position and its
recall by distance, per method, into build/demo. A second call goes on where the first was stopped.
"""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from tqdm import tqdm

from extrope_cli import main as command
from extrope_kernels.evaluation.models import SMOLLM2, converted_folder

OUT = Path(__file__).parents[1] / "build" / "demo"
LENGTH = 16384
PARTS = {
    "loss": ("rope", "pi", "ntk_aware", "yarn", "rerope"),
    "recall": ("rope", "yarn", "rerope"),
}
SHOWS = {
    "loss": "next-token loss by position",
    "recall": "gain of a passage that was read before, by distance",
}
READINGS = sum(map(len, PARTS.values()))


def main() -> int:
    began = time.monotonic()
    print(plan(), flush=True)
    with redirect_stdout(io.StringIO()):  # the table comes with the other methods
        code = read("loss", PARTS["loss"][:1])
    if code == 0:
        print(estimate(), flush=True)
    for task, methods in PARTS.items():
        code = code or read(task, methods)
    if code == 0:
        print(f"Done in {tqdm.format_interval(time.monotonic() - began)}. The pictures:")
        print("\n".join(f"  {OUT / task}.png" for task in PARTS))
    return code


def plan() -> str:
    """Say what the demo will do."""
    lines = [
        f"SmolLM2-135M, trained to 8,192 tokens, reads {LENGTH:,} of the Python reference: "
        f"{READINGS} readings.",
        *(f"  {OUT / task}.png: {SHOWS[task]}, by {', '.join(PARTS[task])}" for task in PARTS),
        "The first reading shows how long one takes here. Ctrl-C keeps those that are done.",
    ]
    if not converted_folder(SMOLLM2).exists():
        lines.append(f"The model stays in {converted_folder(SMOLLM2)}, 540 MB.")
    return "\n".join(lines)


def estimate() -> str:
    """Say how long the readings take, by the first one."""
    rows = json.loads((OUT / "loss.json").read_text())["rows"]
    seconds = next(row["seconds"] for row in rows if row["method"] == PARTS["loss"][0])
    total = tqdm.format_interval(seconds * READINGS)
    return f"A reading takes {seconds:.0f} s here, all {READINGS} about {total}."


def read(task: str, methods: tuple[str, ...]) -> int:
    """Measure what is missing, draw the picture, and return the exit code."""
    what = ["--model", SMOLLM2, "--task", task, "--methods", ",".join(methods)]
    return command(["eval", *what, "--lengths", str(LENGTH), "--trials", "1", "--out", str(OUT)])


if __name__ == "__main__":
    sys.exit(main())
