"""Shared by all steps: the time limit, the verdict, and the folder of results with its table."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, folder_of, table

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
BUILD = ROOT / "build" / "gpu"


@dataclass
class Verdict:
    """A step's result: a line, and numbers."""

    ok: bool
    line: str
    content: dict = field(default_factory=dict)


class Deadline:
    """The end of a step's time, and the place for its results so far.

    keep: saves a verdict. A step that is ended from outside has only what it kept.
    """

    def __init__(
        self, seconds: float = 500.0, keep: Callable[[Verdict], None] = lambda _: None
    ) -> None:
        self.end, self.keep = time.time() + seconds, keep

    @property
    def left(self) -> float:
        return max(self.end - time.time(), 0.0)

    def __bool__(self) -> bool:
        """Return True if there is time for more."""
        return self.left > 0


# -------------------------------------------------------------------------------------------------
# The machine


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def about() -> dict[str, Any]:
    """Return what results were made with."""
    major, minor = torch.cuda.get_device_capability()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return {
        "card": torch.cuda.get_device_name(),
        "capability": 10 * major + minor,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "when": time.time(),
    }


# -------------------------------------------------------------------------------------------------
# Files: STEP.json, and README.md with the verdicts and tables of all steps


def folder(card: str) -> Path:
    return RESULTS / folder_of(card)


def path_of(step: str, where: Path) -> Path:
    return where / f"{step.replace(' ', '-')}.step.json"


def save(step: str, verdict: Verdict, about: dict[str, Any], where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    content = {**about, **verdict.content}
    content |= {"step": step, "ok": verdict.ok, "verdict": verdict.line}
    path = path_of(step, where)
    whole = path.with_suffix(".new")  # if ended while writing, the last file stays
    whole.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(whole, path)
    (where / "README.md").write_text(markdown(where))


def kept_since(step: str, started: float, where: Path) -> dict[str, Any]:
    """Return what a step kept before it was ended from outside; {} if nothing."""
    path = path_of(step, where)
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept if kept.get("when", 0.0) >= started else {}


def markdown(where: Path) -> str:
    steps = [json.loads(path.read_text()) for path in where.glob("*.step.json")]
    steps.sort(key=lambda step: step["when"])
    lines = []
    for step in steps:
        made_with = (f"{key} {step[key]}" for key in ("torch", "triton", "commit") if key in step)
        passed = "yes" if step["ok"] else "**no**"
        lines.append([step["step"], passed, step["verdict"], ", ".join(made_with)])
    parts = [f"# {steps[0]['card']}", table(["step", "passed", "verdict", "with"], lines)]
    for step in steps:
        if "table" in step:
            parts += [f"## {step['step']}", step["table"]]
    return "\n\n".join(parts) + "\n"
