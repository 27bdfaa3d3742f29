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
import importlib.util
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
        "eval --model path/to/longer --lengths 64k --out found",
    ),
    "bench": ("bench", "bench rope attention"),
}
_AFTER = {
    "eval": "Ctrl-C keeps the finished rows; the same call goes on with the others.",
}
_MULTIPLES = {"": 1, "k": 1 << 10, "m": 1 << 20}
PACKAGED = ("smollm2", "gemma3-270m")  # models that pip brings: evaluation.packages has them
BUILT_IN_TEXT = "pydocs"


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong.

    commands: the parser of each command.
    """

    commands: dict[str, Parser]

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
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = parser.commands.get(args.command, parser)
        options = re.findall(r"--[\w-]+", command.format_help())
        meant = difflib.get_close_matches(unknown[0].partition("=")[0], options, 1)
        hint = "".join(f"; did you mean {each}?" for each in meant)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if args.version:
        print(f"extrope_kernels {version()}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    del args.version
    if wrong := _wrong(args):
        print(f"{args.command}: {wrong}", file=sys.stderr)
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


def version() -> str:
    """Return the package's version, without an import of it."""
    spec = importlib.util.find_spec("extrope_kernels")
    source = Path(spec.origin).read_text() if spec and spec.origin else ""
    return re.findall(r'^__version__ = "(.*)"', source, re.MULTILINE)[0]


def _wrong(args: argparse.Namespace) -> str | None:
    """Return what is wrong with a command's options, of all that needs no torch to be told."""
    if args.command == "check" and not _exists(args.model):
        return f"{args.model}: {not_found(args.model)}"
    if args.command == "eval":
        if not Path(args.model).exists() and args.model not in PACKAGED:
            return f"model {args.model}: no such folder or .gguf file{_meant(args.model)}"
        for text in args.text or ():
            if text != BUILT_IN_TEXT and not Path(text).is_file():
                return f"text {text}: no such file"
        if args.methods is None and not Path(args.model, "extrope.json").is_file():
            return "--methods must be named for a model that was not saved as extended"
        for method, name, _ in args.param:
            if method not in (args.methods or ()):
                return f"--param {method}.{name}: {method} is not among --methods"
    return None


def _exists(model: str) -> bool:
    """Return True for a path, a model that pip brings, and a name in the hub's cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    in_cache = (cache / f"models--{model.replace('/', '--')}").exists()
    return model in PACKAGED or Path(model).exists() or in_cache


def not_found(model: str) -> str:
    """Return that a model to check is nowhere, and where it may be had."""
    missing = "no such folder, .gguf file or config.json, and not in the hub's local cache"
    in_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.gguf)", model)
    fetch = f"; to fetch it: hf download {model} config.json" if in_hub else ""
    return missing + (_meant(model) or fetch)


def _meant(model: str) -> str:
    """Return which of the models that pip brings may have been meant."""
    return "".join(f"; did you mean {x}?" for x in difflib.get_close_matches(model, PACKAGED, 1))


def make_parser() -> Parser:
    """Return the parser of all commands, named as the command was called."""
    script = "extrope"
    prog = script if Path(sys.argv[0]).stem == script else "python -m extrope_kernels"
    parser = Parser(prog=prog, description="Let a transformer read further than it was trained to.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.commands = commands.choices

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
    add(
        "--methods",
        type=names,
        help="comma-separated: rope,yarn,...,rerope,auto; default: saved, what a folder was saved "
        "as extended by",
    )
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
    add("--bucket", type=count, default=2048, help="loss: tokens per bucket (default 2048)")
    add("--trials", type=count, default=3, help="pieces of each text (default 3)")
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--out", required=True, help="folder for the JSON file and the plot")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="of where texts are cut (default 0)")


def tokens(text: str) -> int:
    """Return a number of tokens: 131072, 131,072 or 128k (k: 1,024; m: 1,024 k)."""
    found = re.fullmatch(r"(\d+|\d{1,3}(?:,\d{3})+)([km]?)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be a number of tokens, as 131072, 131,072 or 128k, got {text!r}"
        )
    if not (number := int(found[1].replace(",", "")) * _MULTIPLES[found[2]]):
        raise argparse.ArgumentTypeError(f"must be at least 1 token, got {text!r}")
    return number


def lengths(text: str) -> list[int]:
    """Return the numbers of tokens that a text lists, each with no comma of its own."""
    listed = [tokens(part) for part in names(text)]
    if 1 in listed:
        raise argparse.ArgumentTypeError("must be at least 2 tokens each, got 1")
    return listed


def count(text: str) -> int:
    """Return a whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


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
