"""Build the libraries that other steps need, and list versions."""

from __future__ import annotations

from extrope_kernels import _ext, cli

from .results import Deadline, Verdict, installed

PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "flashinfer-python", "liger-kernel")


def run(deadline: Deadline) -> Verdict:
    """Build; fail without any compiled kernel, and with nvcc but without the CUDA library.

    Without it the suite has no such cases, and says nothing.
    """
    reasons = {name: _ext.load(name) for name in ("cpu", "cuda")}
    print(cli.info(), flush=True)
    packages = {name: installed(name) for name in ("torch", "triton", *PEERS)}
    said = [f"{name} library: {reason or 'built'}" for name, reason in reasons.items()]
    said += [f"{name} {number}" for name, number in packages.items() if number]
    why = reasons["cuda"]
    without_nvcc = why is not None and "nvcc not found" in why
    if why and not without_nvcc:
        said.insert(0, "nothing of CUDA C++ will be tested or timed, though nvcc is there")
    ok = why is None or (without_nvcc and bool(packages["triton"]))
    return Verdict(ok, "; ".join(said), {"libraries": reasons, "packages": packages})
