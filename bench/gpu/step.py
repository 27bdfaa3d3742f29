"""What every step shares: its limit, its verdict, where results go, and the table of them all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness import folder_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BUILD = ROOT / "build" / "gpu"
LIMIT = 500.0  # seconds that a step gives itself; KILLED after that it is ended from outside
KILLED = 530.0


@dataclass
class Verdict:
    """How a step ended: in one line, and in numbers."""

    ok: bool
    line: str
    content: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    run: Callable[[Deadline], Verdict]
    about: str


class Deadline:
    """Until when a step may go on, and where it leaves what it has come to meanwhile."""

    def __init__(
        self, seconds: float = LIMIT, keep: Callable[[Verdict], None] = lambda _: None
    ) -> None:
        """keep: saves a verdict. A step that is ended from outside has nothing but what it kept."""
        self.end, self.keep = time.time() + seconds, keep

    @property
    def left(self) -> float:
        return max(self.end - time.time(), 0.0)

    def __bool__(self) -> bool:
        """Whether there is time for more."""
        return self.left > 0


def folder(card: str, results: Path = RESULTS) -> Path:
    return results / folder_of(card)


def save(name: str, verdict: Verdict, about: dict, where: Path) -> None:
    """Keep a step's JSON, and make the table of all steps anew. about: card, torch, Triton, ..."""
    where.mkdir(parents=True, exist_ok=True)
    content = {"step": name, "ok": verdict.ok, "verdict": verdict.line, **about, **verdict.content}
    path = _path(name, where)
    whole = path.with_suffix(".new")  # whoever is ended while writing leaves the last one
    whole.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(whole, path)
    (where / "README.md").write_text(markdown(where))


def save_ended(name: str, why: str, about: dict, where: Path, started: float) -> Verdict:
    """Keep how a step was ended from outside, and with it what the step itself kept since then."""
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
    """The verdicts of all steps that were run on this card, and the tables of some."""
    steps = [json.loads(path.read_text()) for path in sorted(where.glob("*.json"))]
    steps.sort(key=lambda step: step["when"])
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


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
