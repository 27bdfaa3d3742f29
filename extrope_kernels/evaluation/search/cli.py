"""The `search` command: finds the method by which a model reads a length best."""

from __future__ import annotations

import argparse

from ..cli import run_command
from .pieces import OBJECTIVES
from .run import DTYPES, search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--text", action="append", required=True, help="UTF-8 file, or pydocs; repeatable")
    add("--length", type=int, required=True, help="tokens that the model is to read")
    add("--out", required=True, help="folder for search.json, search.png and extended/config.json")
    add("--held-out", help="text that decides; default: the second half of each --text")
    add("--budget", type=float, default=60.0, help="minutes of measuring (default 60)")
    add(
        "--objective",
        choices=tuple(OBJECTIVES),
        default="loss",
        help="of the last quarter (default), or recall: of passages that come again",
    )
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="of where texts are cut (default 0)")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code, the same as for `eval`."""
    return run_command("search", _run, args)


def _run(args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name != "command"}
    search(options.pop("model"), options.pop("text"), **options)
