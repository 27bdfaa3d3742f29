"""A pytest plugin: every Triton launch is executed as PTX, for the `chip` of a test if it has one.

TRITON_INTERPRET=0 EXTROPE_TRITON_CHIP=90 PYTHONPATH=tests \\
    python -m pytest -p support.ptx.plugin tests/rope -k triton

A test fails where a launch raced, left its bounds or skipped a fence or a wait.
"""

import os

import pytest
import triton

from . import launch

# By chip and version of Triton, what it does wrong itself; triton-lang/triton#9610 is the first.
KNOWN = {
    (90, "3.6.0"): {"loads without fence.proxy.async what was stored"},
    (100, "3.6.0"): {"loads without fence.proxy.async what was stored"},
    (90, "3.7.1"): {"registers were written after wgmma.fence"},
}


def known_findings() -> set[str]:
    """Return the kinds of findings that are this Triton's own doing on this chip."""
    return KNOWN.get((int(os.environ["EXTROPE_TRITON_CHIP"]), triton.__version__), set())


def pytest_configure(config):
    launch.install(int(os.environ["EXTROPE_TRITON_CHIP"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    chip = getattr(getattr(item, "callspec", None), "params", {}).get("chip")
    if chip is not None:
        launch.compile_for(chip)
    launch.LOG.clear()
    result = yield
    known = known_findings()
    found = [
        f"{count} x {what}"
        for what, count in launch.LOG.findings.items()
        if what.split(": ")[0] not in known
    ]
    if found:
        pytest.fail("\n".join(found))
    return result


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{launch.LOG.launches} launches executed as PTX")
