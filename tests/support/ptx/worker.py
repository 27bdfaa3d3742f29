"""Run tests in a process of their own, where Triton compiles and PTX is executed.

The suite's processes interpret kernels: Triton decides that once, when they are decorated. `Worker`
is the suite's end; the other is a pytest with the plugins `support.ptx.plugin` and this one, which
takes node ids from a socket and answers (outcome, text).
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
OPTIONS = "-p support.ptx.plugin -p support.ptx.worker -p no:xdist -p no:cacheprovider"


class Worker:
    """A process that runs tests of `folder`, each for its chip; it imports from `first` first."""

    def __init__(self, config: pytest.Config, folder: Path, first: Path | None) -> None:
        here, there = socket.socketpair()
        self.lines = here.makefile("rwb")
        here.close()
        paths = [str(x) for x in (first, TESTS) if x] + os.environ.get("PYTHONPATH", "").split(":")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {
            "CUDA_VISIBLE_DEVICES": "",
            "EXTROPE_TRITON_CHIP": "90",  # until a test names its own
            "OMP_NUM_THREADS": "1",
            "PTX_WORKER_SOCKET": str(there.fileno()),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_INTERPRET": "0",
        }
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *OPTIONS.split(), "-m", "",
             f"--rootdir={config.rootpath}", str(folder)],
            cwd=config.rootpath,
            env=environment,
            pass_fds=(there.fileno(),),
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        there.close()

    def run(self, nodeid: str) -> tuple[str, str]:
        """(outcome, text) of a test: "passed", "skipped" or "failed"."""
        try:
            pickle.dump(nodeid, self.lines)
            self.lines.flush()
            return pickle.load(self.lines)
        except (EOFError, BrokenPipeError, ConnectionError):
            self.output.seek(0)
            return "failed", f"the process that executes PTX has ended:\n{self.output.read()}"

    def close(self) -> None:
        self.lines.close()
        self.process.wait()
        self.output.close()


reports: list[pytest.TestReport] = []  # of the test that runs


def pytest_runtest_logreport(report):
    reports.append(report)


def pytest_runtestloop(session):
    """Run the tests that are asked for, instead of all that were collected."""
    items = {item.nodeid: item for item in session.items}
    with socket.socket(fileno=int(os.environ["PTX_WORKER_SOCKET"])) as there:
        lines = there.makefile("rwb")
        while True:
            try:
                item = items[pickle.load(lines)]
            except EOFError:
                return True
            reports.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            pickle.dump(_verdict(), lines)
            lines.flush()


def _verdict() -> tuple[str, str]:
    failed = [f"{x.longreprtext}\n{x.capstdout}" for x in reports if x.failed]
    if failed:
        return "failed", "\n".join(failed)
    skipped = [x.longrepr[2] for x in reports if x.skipped]
    return ("skipped", skipped[0].removeprefix("Skipped: ")) if skipped else ("passed", "")
