"""The steps, each run in its own process, so that it can be ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from importlib import import_module
from typing import NamedTuple

from .results import ROOT, TESTS, Deadline, Verdict, about, folder, kept_since, save

RUN = ROOT / "bench" / "gpu" / "run.py"
KILLED = 530.0  # seconds, after which a step is ended from outside
INSIDE = "--inside"
CARD = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


class Step(NamedTuple):
    """A step; the module of this package has run(*given, deadline)."""

    about: str
    module: str
    given: tuple[str, ...] = ()


OF_THE_HOST = {"bench", "check", "evaluation", "installation", "pages"}  # rooms of tests
SUITES = sorted({path.parent.name for path in TESTS.glob("*/test_*.py")} - OF_THE_HOST)
STEPS = {
    "build": Step("the libraries built, versions", "build"),
    "smoke": Step("one launch of every kernel against the reference", "smoke"),
    **{f"suite {name}": Step(f"tests/{name}", "suite", (name,)) for name in SUITES},
    **{f"bench {name}": Step(f"timings of {name}, beside peers", "timing", (name,))
       for name in ("rope", "attention", "training", "decode")},
    **{f"tune {name}": Step(f"tiles of {name}", "tune", (name,))
       for name in ("forward", "dq", "dkv", "decode")},
}  # fmt: skip


def main(argv: list[str]) -> int:
    if argv == ["--list"]:
        print("\n".join(f"{name:24} {step.about}" for name, step in STEPS.items()))
        return 0
    asked = " ".join(word for word in argv if word != INSIDE)
    names = [name for name in STEPS if asked in ("", name) or name.startswith(f"{asked} ")]
    if not names:
        print(f"gpu: STEP must be one of {list(STEPS)}, got {asked!r}", file=sys.stderr)
        return 2
    if INSIDE in argv:
        return run_here(names[0])
    # Another process asks for the card: this one is to hold none of its memory.
    done = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True)
    if not (card := done.stdout.strip()):
        why = "".join(f": {line}" for line in done.stderr.strip().splitlines()[-1:])
        print(f"gpu: no CUDA device, nothing was run{why}")
        return 1
    verdicts = {name: run_apart(name, card) for name in names}
    if len(names) > 1:
        print(f"\n{card}, into {folder(card)}")
        for name, verdict in verdicts.items():
            print(f"{'ok    ' if verdict.ok else 'FAILED'} {name}: {verdict.line}")
    return int(not all(verdict.ok for verdict in verdicts.values()))


def run_here(name: str) -> int:
    """Run one step in this process and keep its results."""
    made_with = about()  # before a bad access can block the card
    keep = partial(save, name, about=made_with, where=folder(made_with["card"]))
    run = import_module(f"{__package__}.{STEPS[name].module}").run
    verdict = run(*STEPS[name].given, Deadline(keep=keep))
    keep(verdict)
    print(f"{name}: {verdict.line}", flush=True)
    return int(not verdict.ok)


def run_apart(name: str, card: str) -> Verdict:
    """Run one step in a process that is ended, with its children, when its time is up."""
    print(f"\n{name}: {STEPS[name].about}", flush=True)
    command = [sys.executable, str(RUN), *name.split(), INSIDE]
    started, said, last = time.time(), "", ""
    process = subprocess.Popen(
        command, start_new_session=True, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    killer = threading.Timer(KILLED, os.killpg, (process.pid, signal.SIGKILL))
    killer.daemon = True
    killer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        said = last if last.startswith(f"{name}: ") else said
    code = process.wait()
    killer.cancel()
    if said and code in (0, 1):
        return Verdict(code == 0, said.removeprefix(f"{name}: "))
    why = f"ended with status {code} after {time.time() - started:.0f} s, at: {last[:200]}"
    kept = kept_since(name, started, folder(card)) or {"card": card, "when": time.time()}
    why += f"; before: {kept['verdict']}" if "verdict" in kept else ""
    verdict = Verdict(False, why)
    save(name, verdict, kept, folder(card))
    print(f"{name}: {verdict.line}", flush=True)
    return verdict
