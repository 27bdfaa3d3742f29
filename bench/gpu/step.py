"""Shared by all steps: the time limit, the verdict, the folder of results, and their table."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import folder_of, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BUILD = ROOT / "build" / "gpu"
LIMIT = 500.0  # seconds of a step's own limit; KILLED seconds later it is ended from outside
KILLED = 530.0


@dataclass
class Verdict:
    """A step's result: a line, and numbers."""

    ok: bool
    line: str
    content: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    run: Callable[[Deadline], Verdict]
    about: str


class Deadline:
    """The end of a step's time, and the place for its results so far."""

    def __init__(
        self, seconds: float = LIMIT, keep: Callable[[Verdict], None] = lambda _: None
    ) -> None:
        """Start; keep: saves a verdict. A step ended from outside has only what it kept."""
        self.end, self.keep = time.time() + seconds, keep

    @property
    def left(self) -> float:
        return max(self.end - time.time(), 0.0)

    def __bool__(self) -> bool:
        """Return True if there is time for more."""
        return self.left > 0


def folder(card: str, results: Path = RESULTS) -> Path:
    return results / folder_of(card)


def save(name: str, verdict: Verdict, about: dict, where: Path) -> None:
    """Keep a step's JSON, and make the table of all steps anew. about: card, torch, Triton, ..."""
    where.mkdir(parents=True, exist_ok=True)
    content = {"step": name, "ok": verdict.ok, "verdict": verdict.line, **about, **verdict.content}
    path = _path(name, where)
    whole = path.with_suffix(".new")  # if ended while writing, the last file stays
    whole.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(whole, path)
    (where / "README.md").write_text(markdown(where))


def save_ended(name: str, why: str, about: dict, where: Path, started: float) -> Verdict:
    """Keep how a step was ended from outside, with the results that it kept itself."""
    path = _path(name, where)
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("when", 0.0) < started:
        kept = {}
    line = f"{why}; before: {kept['verdict']}" if kept else why
    content = {key: x for key, x in kept.items() if key not in ("step", "ok", "verdict")}
    verdict = Verdict(False, line, content)
    save(name, verdict, about, where)
    return verdict


def _path(name: str, where: Path) -> Path:
    return where / f"{name.replace(' ', '-')}.json"


def markdown(where: Path) -> str:
    """Make the verdicts of all steps that ran on this card, and the tables of some.

    `make bench` writes into the same folder.
    """
    found = [json.loads(path.read_text()) for path in sorted(where.glob("*.json"))]
    steps = sorted((x for x in found if "step" in x), key=lambda step: step["when"])
    lines = [
        [s["step"], "yes" if s["ok"] else "**no**", s["verdict"], _made_with(s)] for s in steps
    ]
    parts = [f"# {steps[0]['card']}", table(["step", "passed", "verdict", "with"], lines)]
    for step in steps:
        if rows := step.get("table"):
            parts += [f"## {step['step']}", table(rows["head"], rows["rows"])]
    return "\n\n".join(parts) + "\n"


def _made_with(step: dict) -> str:
    return ", ".join(f"{key} {step[key]}" for key in ("torch", "triton", "commit") if key in step)


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """Start a process whose output `lines_of` reads."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, errors="replace", **options)


def lines_of(process: subprocess.Popen) -> Iterator[str]:
    """Yield the lines of a process as they come, and print them."""
    for line in process.stdout:
        print(line, end="", flush=True)
        yield line.rstrip()
