"""The `search` command: what lets this model read this length best, as a configuration to load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import UsageError, models, options, report
from ..cli import run_command
from ..digests import model_digest
from ..texts import Text, read_text, read_texts, source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 9  # tokens: each eighth of their predictions has one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--text", action="append", required=True, help="UTF-8 file, or pydocs; repeatable")
    add("--length", type=int, required=True, help="tokens that the model is to read")
    add("--out", required=True, help="folder for search.json, search.png and extended/config.json")
    add("--held-out", help="text that decides; default: the second half of each --text")
    add("--budget", type=float, default=60.0, help="minutes of measuring (default 60)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="of where texts are cut (default 0)")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code, as `eval` does."""
    return run_command("search", _run, args)


def split_texts(
    tokenizer: PreTrainedTokenizerBase, names: list[str], held_out: str | None, length: int
) -> tuple[list[Text], list[Text]]:
    """Return what to search on and what decides, which have no token in common.

    Raises UsageError where a part has less than `length` tokens, or is searched on and decides,
    and where a text is given twice.
    """
    if held_out is not None and source(held_out) in map(source, names):
        raise UsageError(f"--held-out {held_out}: is searched on, too")
    whole = read_texts(tokenizer, names)
    if held_out is not None:
        texts, decides = whole, [read_text(tokenizer, held_out, "--held-out")]
        if decides[0].digest in [text.digest for text in texts]:
            raise UsageError(f"--held-out {held_out}: is searched on, too")
    else:
        halves = [text.halves() for text in whole]
        texts, decides = [first for first, _ in halves], [second for _, second in halves]
    for text in (*texts, *decides):
        if text.tokens < length:
            raise UsageError(
                f"{text.name}: {text.tokens:,} tokens, too short for --length {length:,}"
            )
    return texts, decides


def _run(args: argparse.Namespace) -> None:
    if args.length < _SHORTEST:
        raise UsageError(f"--length must be >= {_SHORTEST}, got {args.length}")
    if not args.budget > 0:
        raise UsageError(f"--budget must be > 0, got {args.budget:g}")
    out = options.check_out(args.out)
    files, device = models.prepared(args.model, args.device)
    from .run import search_model  # only now: it imports transformers, which takes seconds

    print(f"loading {args.model}", file=sys.stderr, flush=True)
    with report.telling(lambda: f"loading {args.model}"):
        tokenizer = models.load_tokenizer(files)
        texts, held_out = split_texts(tokenizer, args.text, args.held_out, args.length)
        model = models.load_model(files, args.dtype, device)
        models.keep_converted(args.model, files, model, tokenizer)
    if args.held_out is None:
        print("search: the first half of each text is searched on, the second decides", flush=True)
    settings: dict[str, Any] = {
        "task": "search",
        "model": Path(args.model).name,
        "model_digest": model_digest(model),
        "dtype": args.dtype,
        "length": args.length,
        "texts": [text.about() for text in texts],
        "held_out": [text.about() for text in held_out],
        "seed": args.seed,
    }
    search_model(model, texts, held_out, settings, 60 * args.budget, out)
