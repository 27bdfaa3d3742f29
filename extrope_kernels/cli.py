"""The command line: info, check, eval, search, bench."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

from . import __version__, _build, _ext
from .evaluation import cli as evaluation
from .evaluation.search import cli as search
from .model_check import cli as check
from .ops import attention, permuteformer, rope

CPU_CAPABILITIES = (
    "baseline",
    "AVX2",
    "AVX-512",
    "AVX-512 BF16",
    "AMX",
    "NEON",
)  # the numbers that extrope::cpu_capability returns
_EXAMPLES = {
    "info": ("info",),
    "check": (
        "check Qwen/Qwen3-0.6B",
        "check path/to/model --length 65536",
        "check config.json --length 65536 --json",
    ),
    "eval": (
        "eval --model smollm2 --methods rope,yarn,rerope --lengths 16384 --out found",
        "eval --model path/to/model --task recall --methods yarn,rerope --lengths 16384,32768 "
        "--text book.txt --param yarn.beta_fast=16 --out found",
    ),
    "search": (
        "search --model smollm2 --text pydocs --length 16384 --budget 60 --out found",
        "search --model path/to/model --text a.txt --text b.txt --held-out c.txt --length 32768 "
        "--dtype bfloat16 --out found",
    ),
    "bench": ("bench", "bench rope attention"),
}
_AFTER = {
    "eval": "Ctrl-C keeps the finished rows; the same call goes on with the others.",
    "search": "Ctrl-C keeps what was measured; the same call goes on behind it.",
}
OPS = {"rope": rope, "attention": attention, "permuteformer": permuteformer}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help shows all\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = make_parser().parse_args(argv)
    try:
        if args.command == "info":
            print(info())
            return 0
        if args.command == "bench":
            return run_benchmarks(args.names)
        return {"eval": evaluation, "search": search, "check": check}[args.command].run(args)
    except KeyboardInterrupt:
        print(f"{args.command}: interrupted", file=sys.stderr)
        return 130


def make_parser() -> Parser:
    """Return the parser of all commands, named as the command was called."""
    script = "extrope"
    prog = script if Path(sys.argv[0]).stem == script else "python -m extrope_kernels"
    parser = Parser(prog=prog, description="Let a transformer read further than it was trained to.")
    parser.add_argument("--version", action="version", version=f"extrope_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, says: str) -> Parser:
        examples = "\n".join(f"  {prog} {example}" for example in _EXAMPLES[name])
        after = f"\n\n{_AFTER[name]}" if name in _AFTER else ""
        return commands.add_parser(
            name,
            help=says,
            description=f"{says[0].upper()}{says[1:]}.",
            epilog=f"examples:\n{examples}{after}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    add("info", "show what is installed and which kernel runs where")
    check.add_arguments(add("check", "show what a model's configuration really does"))
    evaluation.add_arguments(add("eval", "measure a model past its training length, per method"))
    search.add_arguments(add("search", "find what lets a model read a length best"))
    bench = add("bench", "run the benchmarks of a checkout")
    bench.add_argument("names", nargs="*", metavar="NAME", help="such as rope; default: all")
    return parser


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
        if op == "attention":
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
        return "not installed"


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
