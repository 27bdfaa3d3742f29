"""The command `extrope`: its options, and what runs each command.

It stands beside the package, whose import loads torch: help and mistakes are answered without.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import gc
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

# The module of each command, whose `run` takes the parsed options and returns the exit code.
COMMANDS = {
    "info": "extrope_kernels.cli",
    "check": "extrope_kernels.model_check.cli",
    "eval": "extrope_kernels.evaluation.cli",
    "bench": "extrope_kernels.cli",
}
_EXAMPLES = {
    "info": ("info",),
    "check": (
        "check Qwen/Qwen3-0.6B",
        "check path/to/model --length 128k",
        "check config.json --length 65536 --json",
    ),
    "eval": (
        "eval --model smollm2 --methods rope,yarn,rerope --lengths 16k --out found",
        "eval --model path/to/model --task recall --methods yarn,rerope --lengths 16384,32768 "
        "--text book.txt --param yarn.beta_fast=16 --out found",
    ),
    "bench": ("bench", "bench rope attention"),
}
_AFTER = {
    "eval": "Ctrl-C keeps the finished rows; the same call goes on with the others.",
}
_MULTIPLES = {"": 1, "k": 1 << 10, "m": 1 << 20}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        if given := re.match(r"argument COMMAND: invalid choice: '(\w+)'", message):
            found = difflib.get_close_matches(given[1], COMMANDS, 1)
            message += "".join(f"; did you mean {each!r}?" for each in found)
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help shows all\n")


def run() -> int:
    """Run the command, even if the reader of its output (head, a full disk) stops early."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt:
        print("extrope: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        code = 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"extrope: cannot print: {error.strerror}", file=sys.stderr)
        code = 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    return code


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; show the help if none is named."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.version:
        print(f"extrope_kernels {importlib.import_module('extrope_kernels').__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    del args.version
    if args.command == "check" and _is_missing(args.model):
        missing = "no such folder, .gguf file or config.json, and not in the hub's local cache"
        print(f"check: {args.model}: {missing}", file=sys.stderr)
        return 2
    try:
        if args.command == "check":  # looking for garbage, of which it makes little, takes long
            gc.disable()
        return importlib.import_module(COMMANDS[args.command]).run(args)
    except KeyboardInterrupt:
        print(f"{args.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        gc.enable()


def _is_missing(model: str) -> bool:
    """Return True for a path that is none: answered before torch is imported, in seconds.

    A name without a slash or an ending may be that of a package.
    """
    path, home = Path(model), Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    named = "/" not in model and path.suffix not in (".json", ".gguf")
    return not (named or path.exists() or (cache / f"models--{model.replace('/', '--')}").exists())


def make_parser() -> Parser:
    """Return the parser of all commands, named as the command was called."""
    script = "extrope"
    prog = script if Path(sys.argv[0]).stem == script else "python -m extrope_kernels"
    parser = Parser(prog=prog, description="Let a transformer read further than it was trained to.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

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
    _check(add("check", "show what a model's configuration really does"))
    _eval(add("eval", "measure a model past its training length, per method"))
    bench = add("bench", "run the benchmarks of a checkout")
    bench.add_argument("names", nargs="*", metavar="NAME", help="such as rope; default: all")
    return parser


def _check(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "model", metavar="MODEL", help="folder, .gguf, config.json, smollm2, or name in hub's cache"
    )
    add("--length", type=tokens, help="tokens to read, as 131072, 131,072 or 128k: what to try")
    add("--json", action="store_true", help="the same facts as JSON")


def _eval(parser: Parser) -> None:
    add = parser.add_argument
    add("--task", choices=("loss", "recall"), default="loss", help="default: loss")
    add("--methods", type=names, required=True, help="comma-separated: rope,yarn,...,rerope,auto")
    add("--lengths", type=lengths, required=True, help="numbers of tokens: 8192,16384 or 8k,16k")
    add("--text", action="append", help="UTF-8 file, or pydocs: the Python reference; repeatable")
    add(
        "--param",
        type=param,
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="a parameter of one method, such as yarn.beta_fast=16; repeatable",
    )
    add("--bucket", type=int, default=2048, help="loss: tokens per bucket (default 2048)")
    add("--trials", type=int, default=3, help="pieces of each text (default 3)")
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--out", required=True, help="folder for the JSON file and the plot")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="of where texts are cut (default 0)")


def tokens(text: str) -> int:
    """Return a number of tokens: 131072, 131,072 or 128k (k: 1,024; m: 1,024 k)."""
    found = re.fullmatch(r"(-?\d+|\d{1,3}(?:,\d{3})+)([km]?)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be a number of tokens, as 131072, 131,072 or 128k, got {text!r}"
        )
    return int(found[1].replace(",", "")) * _MULTIPLES[found[2]]


def lengths(text: str) -> list[int]:
    """Return the numbers of tokens that a text lists, each with no comma of its own."""
    return [tokens(part) for part in names(text)]


def names(text: str) -> list[str]:
    """Return what a text lists, each once."""
    if not (parts := [part.strip() for part in text.split(",") if part.strip()]):
        raise argparse.ArgumentTypeError("must list at least one value, separated by commas")
    return list(dict.fromkeys(parts))


def param(text: str) -> tuple[str, str, Any]:
    """Return the method, the name and the value of METHOD.NAME=VALUE."""
    if (found := re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)) is None:
        raise argparse.ArgumentTypeError(f"must read METHOD.NAME=VALUE, got {text}")
    method, name, value = found.groups()
    try:
        return method, name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return method, name, value
