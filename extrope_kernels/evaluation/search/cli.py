"""The `search` command: finds the method by which a model reads a length best."""

from __future__ import annotations

import argparse

from ..cli import TEXT, add_common_arguments, run_command
from .pieces import OBJECTIVES
from .run import search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--text", dest="texts", action="append", required=True, help=TEXT)
    add("--length", type=int, required=True, help="tokens that the model is to read")
    add("--held-out", help="text that decides; default: the second half of each --text")
    add("--budget", type=float, default=60.0, help="minutes of measuring (default 60)")
    add(
        "--objective",
        choices=tuple(OBJECTIVES),
        default="loss",
        help="of the last quarter (default), or recall: of passages that come again",
    )
    add_common_arguments(parser, "folder for search.json, search.png and extended/config.json")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code, the same as for `eval`."""
    return run_command("search", search, args)
