"""The steps, each run in its own process, so that it can be ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from . import build, sanitizer, smoke, suite, tune, two
from .step import KILLED, ROOT, Deadline, Step, Verdict, folder, lines_of, save, save_ended, start

RUN = ROOT / "bench" / "gpu" / "run.py"
FOLDERS = [str(ROOT / folder) for folder in (".", "bench", "tests/support")]


def bench(deadline: Deadline) -> Verdict:
    from . import rows  # it imports all that benchmarks need

    return rows.run(deadline)


STEPS = {
    "build": Step(build.run, "the libraries built, versions"),
    "smoke": Step(smoke.run, "one launch of every kernel against the reference"),
    "memcheck": Step(sanitizer.memcheck, "the same under compute-sanitizer: accesses"),
    "racecheck": Step(sanitizer.racecheck, "the same under compute-sanitizer: shared memory"),
    **{f"suite {name}": Step(suite.of(name), f"tests/{name}") for name in suite.folders()},
    "two": Step(two.run, "attention over two GPUs under NCCL against one"),
    "bench": Step(bench, "a dozen timings beside bounds and peers"),
    **{f"tune {kernel}": Step(tune.of(kernel), f"tiles of {kernel}") for kernel in tune.KERNELS},
}
INSIDE = "--inside"
CARD = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def main(argv: list[str]) -> int:
    if argv == ["--list"]:
        print("\n".join(f"{name:24} {step.about}" for name, step in STEPS.items()))
        return 0
    inside = INSIDE in argv
    asked = " ".join(word for word in argv if word != INSIDE)
    names = [name for name in STEPS if asked in ("", name) or name.startswith(f"{asked} ")]
    if not names:
        print(f"gpu: STEP must be one of {list(STEPS)}, got {asked!r}", file=sys.stderr)
        return 2
    if inside:
        return here(names[0])
    card, why = card_name()
    if not card:
        print(f"gpu: no CUDA device, nothing was run{why}")
        return 1
    verdicts = {name: apart(name, card) for name in names}
    if len(names) > 1:
        print(f"\n{card}, into {folder(card)}")
        for name, verdict in verdicts.items():
            print(f"{'ok    ' if verdict.ok else 'FAILED'} {name}: {verdict.line}")
    return int(not all(verdict.ok for verdict in verdicts.values()))


def card_name() -> tuple[str, str]:
    """Ask another process for the card's name, or why there is none; this one holds no memory."""
    done = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip(), ""
    return "", f": {done.stderr.strip().splitlines()[-1]}"


def here(name: str) -> int:
    """Run one step in this process and keep its results."""
    about = build.about()  # before a bad access can block the card

    def keep(verdict: Verdict) -> None:
        save(name, verdict, about, folder(about["card"]))

    verdict = STEPS[name].run(Deadline(keep=keep))
    keep(verdict)
    print(f"{name}: {verdict.line}", flush=True)
    return int(not verdict.ok)


def apart(name: str, card: str) -> Verdict:
    """Run one step in a process that is ended, with its children, when its time is up."""
    print(f"\n{name}: {STEPS[name].about}", flush=True)
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, str(RUN), *name.split(), INSIDE]
    process = start(command, env=environment, start_new_session=True)
    killer = threading.Timer(KILLED, os.killpg, (process.pid, signal.SIGKILL))
    killer.daemon = True
    killer.start()
    started, said, last = time.time(), "", ""
    for line in lines_of(process):
        last = line.strip() or last
        said = last if last.startswith(f"{name}: ") else said
    code = process.wait()
    killer.cancel()
    if said and code in (0, 1):
        return Verdict(code == 0, said.removeprefix(f"{name}: "))
    now = time.time()
    why = f"ended with status {code} after {now - started:.0f} s, at: {last[:200]}"
    verdict = save_ended(name, why, {"card": card, "when": now}, folder(card), started)
    print(f"{name}: {verdict.line}", flush=True)
    return verdict


def python_path() -> str:
    """Return PYTHONPATH with our folders first: on a cluster torch may come through it."""
    there = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*FOLDERS, there] if there else FOLDERS)
