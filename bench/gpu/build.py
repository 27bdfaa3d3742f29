"""Build the libraries that other steps need, and list versions."""

from __future__ import annotations

import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from extrope_kernels import _build, _ext, cli

from .step import ROOT, Deadline, Verdict

PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "flashinfer-python", "liger-kernel")


def run(deadline: Deadline) -> Verdict:
    """Build; fail without any compiled kernel, and with nvcc but without the CUDA library.

    Without it the suite has no such cases, and says nothing.
    """
    reasons = {name: _ext.load(name) for name in ("cpu", "cuda")}
    print(cli.info(), flush=True)
    said = [f"{name} library: {reason or 'built'}" for name, reason in reasons.items()]
    packages = {name: installed(name) for name in ("torch", "triton", *PEERS)}
    said += [f"{name} {number}" for name, number in packages.items() if number]
    ok = reasons["cuda"] is None
    if not ok and nvcc_is_there():
        said.insert(0, "nothing of CUDA C++ will be tested or timed, though nvcc is there")
    elif not ok:
        ok = bool(packages["triton"])
    return Verdict(ok, "; ".join(said), {"libraries": reasons, "packages": packages})


def nvcc_is_there() -> bool:
    try:
        return bool(_build.find_nvcc())
    except _build.BuildError:
        return False


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def about() -> dict:
    """Return the versions that results were made with."""
    return {
        "card": torch.cuda.get_device_name(),
        "capability": capability(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit(),
        "when": time.time(),
    }


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def commit() -> str:
    """Return the checkout's commit, with a + if edited; "" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
