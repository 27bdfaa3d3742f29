"""The `eval` command: measures how well each method lets a model read past its training length."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import UsageError, plots
from .runner import DTYPES, TASKS, evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--task", choices=tuple(TASKS), default="loss", help="default: loss")
    add("--methods", required=True, help="comma-separated: rope,pi,yarn,...,rerope,leaky_rerope")
    add("--lengths", required=True, help="comma-separated numbers of tokens: 8192,16384")
    add("--out", required=True, help="folder for the JSON file and the plot")
    add(
        "--text",
        action="append",
        help="UTF-8 file, or pydocs (default): the Python reference; repeatable",
    )
    add(
        "--factor",
        type=float,
        help="of every frequency method; default, of those that need one: length / training length",
    )
    add(
        "--window",
        type=int,
        help="of rerope and leaky_rerope (default: training length / 2), and of self_extend (/ 4)",
    )
    add(
        "--param",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="a parameter of one method, such as yarn.beta_fast=16; repeatable",
    )
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--bucket", type=int, default=2048, help="loss: tokens per bucket (default 2048)")
    add("--trials", type=int, default=3, help="pieces of each text (default 3)")
    add("--seed", type=int, default=0, help="of where texts are cut (default 0)")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    return run_command("eval", _run, args)


def run_command(
    name: str, command: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> int:
    """Run a command and return its exit code; print any error in one line, under this name."""
    try:
        command(args)
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


def _run(args: argparse.Namespace) -> None:
    given = vars(args) | {"text": args.text or ["pydocs"], "table": sys.stdout}
    methods = _params(given.pop("param"), _split("--methods", given.pop("methods")))
    lengths = _lengths(given.pop("lengths"))
    given.pop("command", None)  # set by the parser of all commands
    evaluate(given.pop("model"), methods, lengths, **given)
    png = " and .png" if plots.available() else ""
    print(f"wrote {args.out}/{args.task}.json{png}", file=sys.stderr)


def _split(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"{name} must list at least one value, separated by commas")
    return list(dict.fromkeys(parts))


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in _split("--lengths", text)]
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--lengths must be whole numbers of tokens >= 2, got {text}") from error


def _params(items: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    params: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for item in items:
        key, equals, value = item.partition("=")
        method, dot, name = key.partition(".")
        if not (equals and dot and method and name):
            raise UsageError(f"--param must read METHOD.NAME=VALUE, got {item}")
        if method not in methods:
            raise UsageError(f"--param {item}: {method} is not among --methods")
        params[method][name] = _literal(value)
    return params


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
