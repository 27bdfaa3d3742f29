"""A pytest plugin: every Triton launch of the tests is executed as PTX for one chip.

TRITON_INTERPRET=0 EXTROPE_TRITON_CHIP=90 python -m pytest -p ptx.plugin tests/rope -k triton

A test fails where a launch raced, left its bounds or skipped a fence or a wait.
"""

import os

import pytest

from . import launch


def pytest_configure(config):
    launch.install(int(os.environ["EXTROPE_TRITON_CHIP"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    launch.LOG.clear()
    result = yield
    findings = "\n".join(f"{count} x {what}" for what, count in launch.LOG.findings.items())
    if findings:
        pytest.fail(findings)
    return result


def pytest_terminal_summary(terminalreporter):
    chip = os.environ["EXTROPE_TRITON_CHIP"]
    terminalreporter.write_line(f"{launch.LOG.launches} launches executed as PTX for sm_{chip}")
