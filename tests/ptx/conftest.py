"""Tests with a `chip` run in a process of their own, which executes what Triton compiles for it.

With another `triton_version` that process imports it from build/triton-VERSION. To debug the tests
of one chip, run them in this process:

    TRITON_INTERPRET=0 EXTROPE_TRITON_CHIP=90 PYTHONPATH=tests/support \\
        python -m pytest -p ptx.plugin tests/ptx --pdb
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
from ptx.worker import Worker

CHIPS = (80, 90, 100)
OLDER_TRITONS = ("3.6.0", "3.7.1", "3.8.0")  # beside the one that is installed
ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 3
_workers: dict[tuple[int, str | None], Worker] = {}


def pytest_generate_tests(metafunc):
    if "triton_version" in metafunc.fixturenames:
        metafunc.parametrize("chip, triton_version", list(_older()))
    elif "chip" in metafunc.fixturenames:
        metafunc.parametrize("chip", CHIPS, ids=[f"sm_{chip}" for chip in CHIPS])


def _older():
    """Yield chips with older Tritons; a change can break the oldest: make test has one chip."""
    for chip, version in product(CHIPS, OLDER_TRITONS):
        quick = (chip, version) == (90, OLDER_TRITONS[0])
        marks = () if quick else pytest.mark.thorough
        yield pytest.param(chip, version, id=f"sm_{chip}-{version}", marks=marks)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    params = getattr(getattr(pyfuncitem, "callspec", None), "params", {})
    chip, version = params.get("chip"), params.get("triton_version")
    here = os.environ.get("EXTROPE_TRITON_CHIP")
    if chip is None or here == str(chip):
        return None
    if here is not None:
        pytest.skip(f"this process executes PTX for sm_{here}")
    outcome, text = _worker(pyfuncitem.config, chip, version).run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def _worker(config, chip: int, version: str | None) -> Worker:
    first = None if version is None else ROOT / "build" / f"triton-{version}"
    if first is not None and not first.exists():
        pytest.skip(f"{first.name} is missing: `make test-all` installs it")
    if (chip, version) not in _workers:
        if len(_workers) == MOST_WORKERS:
            _workers.pop(next(iter(_workers))).close()
        _workers[chip, version] = Worker(config, Path(__file__).parent, chip, first)
    return _workers[chip, version]


def pytest_unconfigure(config):
    while _workers:
        _workers.popitem()[1].close()
