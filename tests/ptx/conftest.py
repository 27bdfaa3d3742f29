"""Tests with a `chip` run in a process of their own, which executes what Triton compiles for it.

With another `triton_version` that process imports it from build/triton-VERSION. To debug the tests
of one chip, run them in this process:

    TRITON_INTERPRET=0 EXTROPE_TRITON_CHIP=90 PYTHONPATH=tests \\
        python -m pytest -p support.ptx.plugin tests/ptx -k sm_90 --pdb
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
from support.ptx.worker import Worker

CHIPS = (80, 90, 100)
# Each chip's own instructions: attention and products. The rest is the same code on all of them,
# which make test runs on one.
ON_EVERY_CHIP = ("test_attention", "test_products")
OLDER_TRITONS = ("3.6.0", "3.7.1", "3.8.0")  # beside the one that is installed
ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 2
_workers: dict[str | None, Worker] = {}


def pytest_generate_tests(metafunc):
    if "triton_version" in metafunc.fixturenames:
        metafunc.parametrize("chip, triton_version", list(_older()))
    elif "chip" in metafunc.fixturenames:
        here = metafunc.function.__name__, metafunc.module.__name__
        each = not set(here).isdisjoint(ON_EVERY_CHIP)
        metafunc.parametrize("chip", [_param(f"sm_{x}", each or x == 90, x) for x in CHIPS])


def _older():
    """Yield chips with older Tritons; a change can break the oldest: make test has one chip."""
    for chip, version in product(CHIPS, OLDER_TRITONS):
        quick = (chip, version) == (90, OLDER_TRITONS[0])
        yield _param(f"sm_{chip}-{version}", quick, chip, version)


def _param(name: str, quick: bool, *values):
    return pytest.param(*values, id=name, marks=() if quick else pytest.mark.thorough)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    params = getattr(getattr(pyfuncitem, "callspec", None), "params", {})
    if "chip" not in params or "EXTROPE_TRITON_CHIP" in os.environ:
        return None
    worker = _worker(pyfuncitem.config, params.get("triton_version"))
    outcome, text = worker.run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def _worker(config, version: str | None) -> Worker:
    first = None if version is None else ROOT / "build" / f"triton-{version}"
    if first is not None and not first.exists():
        pytest.skip(f"{first.name} is missing: `make tritons` installs it")
    if version not in _workers:
        if len(_workers) == MOST_WORKERS:
            _workers.pop(next(iter(_workers))).close()
        _workers[version] = Worker(config, Path(__file__).parent, first)
    return _workers[version]


def pytest_unconfigure(config):
    while _workers:
        _workers.popitem()[1].close()
