"""The commands `info` and `bench`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, _build, _ext
from .ops import attention, permuteformer, rope

CPU_CAPABILITIES = (
    "baseline",
    "AVX2",
    "AVX-512",
    "AVX-512 BF16",
    "AMX",
    "NEON",
)  # the numbers that extrope::cpu_capability returns
OPS = {"rope": rope, "attention": attention, "permuteformer": permuteformer}


def run(args: argparse.Namespace) -> int:
    """Run `info` or `bench` and return the exit code."""
    if args.command == "bench":
        return run_benchmarks(args.names)
    print(info())
    return 0


def info() -> str:
    """Return a verdict, then versions, libraries, devices and the kernels in use, a line each."""
    lines = [("Python", platform.python_version()), ("torch", torch.__version__)]
    lines += [(name, _version(name)) for name in ("triton", "transformers")]
    lines += [("C++ compiler", _compiler_version()), ("nvcc", _nvcc_version())]
    lines += [(f"{name} library", report) for name, report in _ext.status().items()]
    lines += [("device", device) for device in _devices()]
    for op, module in OPS.items():
        reports = module.backends()
        lines += [(f"{op} backend {name}", report) for name, report in reports.items()]
        chosen = {f"{op} on {device}": name for device, name in _choices(reports).items()}
        if op == "attention" and torch.cuda.is_available():
            chosen["attention on cuda"] = attention.selection()
        lines += chosen.items()
    width = max(len(label) for label, _ in lines)
    table = [f"{label:<{width}}  {value}" for label, value in lines]
    return "\n".join([f"extrope_kernels {__version__}: {_cpu_verdict()}; {_gpu_verdict()}", *table])


def run_benchmarks(names: list[str]) -> int:
    """Run bench/bench_NAME.py for each name, or all; return the first failing exit code."""
    folder = Path(__file__).resolve().parent.parent / "bench"
    scripts = sorted(folder.glob("bench_*.py"))
    if not scripts:
        print(f"bench: the benchmarks come with a checkout; none in {folder}", file=sys.stderr)
        return 2
    known = {script.stem.removeprefix("bench_"): script for script in scripts}
    for name in names:
        if name not in known:
            print(f"bench: NAME must be one of {list(known)}, got {name!r}", file=sys.stderr)
            return 2
    runs = [subprocess.run([sys.executable, str(known[name])]) for name in names or known]
    return next((run.returncode for run in runs if run.returncode != 0), 0)


def _cpu_verdict() -> str:
    if _ext.load("cpu", quiet=True) is not None:
        return "no CPU kernels: ops run as the reference, which is slow"
    return f"CPU kernels ready ({CPU_CAPABILITIES[torch.ops.extrope.cpu_capability()]})"


def _gpu_verdict() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    chosen = {op: _choices(module.backends())["cuda"] for op, module in OPS.items()}
    return "GPU: " + ", ".join(f"{op} by {name}" for op, name in chosen.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (optional)"


def _compiler_version() -> str:
    try:
        return _build.output([*_build.find_compiler(), "--version"]).partition("\n")[0]
    except _build.BuildError as error:
        return str(error)


def _nvcc_version() -> str:
    try:
        return _build.output([_build.find_nvcc(), "--version"]).rstrip().rpartition("\n")[2]
    except _build.BuildError as error:
        return str(error)


def _devices() -> list[str]:
    devices = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return devices


def _choices(reports: dict[str, str]) -> dict[str, str]:
    """Return the backend that backend=None selects on each type of device here."""
    preferences = {"cpu": ("cpu", "reference")}
    if torch.cuda.is_available():
        preferences["cuda"] = ("fla", "reference") if "fla" in reports else ("cuda", "triton")
    return {
        device: next((name for name in names if reports.get(name) == "available"), "none")
        for device, names in preferences.items()
    }
