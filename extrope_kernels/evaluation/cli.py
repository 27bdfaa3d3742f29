"""The `eval` command: measures how well each method lets a model read past its training length."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from typing import Any

from . import UsageError, plots
from .models import stay_offline
from .options import DTYPES
from .runner import TASKS, evaluate

TEXT = "UTF-8 file, or pydocs: the Python reference; repeatable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="loss", help="default: loss")
    add("--methods", type=names, required=True, help="comma-separated: rope,yarn,...,rerope,auto")
    add("--lengths", type=numbers, required=True, help="numbers of tokens: 8192,16384")
    add("--text", action="append", help=TEXT)
    add(
        "--param",
        type=_param,
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="a parameter of one method, such as yarn.beta_fast=16; repeatable",
    )
    add("--bucket", type=int, default=2048, help="loss: tokens per bucket (default 2048)")
    add("--trials", type=int, default=3, help="pieces of each text (default 3)")
    add_common_arguments(parser, "folder for the JSON file and the plot")


def add_common_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that `eval` and `search` have in common; `out` is the help of one."""
    add = parser.add_argument
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--out", required=True, help=out)
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="of where texts are cut (default 0)")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    return run_command("eval", _run, args)


def run_command(name: str, command: Callable[..., object], args: argparse.Namespace) -> int:
    """Call a command with its options and return its exit code; print any error in one line."""
    given = {option: value for option, value in vars(args).items() if option != "command"}
    stay_offline()
    if not plots.available():
        print(f"{name}: no plot will be drawn: matplotlib is not installed", file=sys.stderr)
    try:
        command(**given)
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # such as a full disk
        why = " ".join(str(error).split())
        print(f"{name}: {why}; what was measured before is in {args.out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; finished rows are in {args.out}", file=sys.stderr)
        return 130
    return 0


def _run(methods: list[str], param: list[tuple[str, str, Any]], **given: Any) -> None:
    params: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for method, name, value in param:
        if method not in params:
            raise UsageError(f"--param {method}.{name}: {method} is not among --methods")
        params[method][name] = value
    given["text"] = given["text"] or "pydocs"
    evaluate(methods=params, table=sys.stdout, **given)
    png = " and .png" if plots.available() else ""
    print(f"wrote {given['out']}/{given['task']}.json{png}", file=sys.stderr)


def names(text: str) -> list[str]:
    """Return what a text lists, each once."""
    if not (parts := [part.strip() for part in text.split(",") if part.strip()]):
        raise argparse.ArgumentTypeError("must list at least one value, separated by commas")
    return list(dict.fromkeys(parts))


def numbers(text: str) -> list[int]:
    """Return the numbers that a text lists; argparse tells that a text is none."""
    return [int(part) for part in names(text)]


def _param(text: str) -> tuple[str, str, Any]:
    if (found := re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)) is None:
        raise argparse.ArgumentTypeError(f"must read METHOD.NAME=VALUE, got {text}")
    method, name, value = found.groups()
    try:
        return method, name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return method, name, value
