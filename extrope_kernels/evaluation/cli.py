"""The `eval` command: how well a model reads past its training length under each method."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from . import UsageError, models, options, plots, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--model", required=True, help="transformers folder, .gguf file, smollm2 or gemma3-270m")
    add("--task", choices=("loss", "passkey", "recall"), default="loss", help="default: loss")
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
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--device", help="torch device; default: cuda where there is one, else cpu")
    add("--bucket", type=int, default=2048, help="loss: tokens per bucket (default 2048)")
    add("--depths", type=int, default=5, help="passkey: depths of the key (default 5)")
    add(
        "--trials",
        type=int,
        default=3,
        help="pieces of each text; passkey: keys per length and depth (default 3)",
    )
    add("--seed", type=int, default=0, help="of where texts are cut, and of keys (default 0)")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    return run_command("eval", _run, args)


def run_command(
    name: str, command: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> int:
    """Run a command of that name, say in one line what went wrong, and return its exit code."""
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
    args.text = args.text or ["pydocs"]
    plan = options.make_plan(args)
    out = options.check_out(args.out)
    files, device = models.prepared(args.model, args.device)
    from . import runner  # only now: it imports transformers, which takes seconds

    slow = " (from GGUF, which takes half a minute or more)" if files.gguf_file else ""
    print(f"loading {args.model}{slow}", file=sys.stderr, flush=True)
    with report.telling(lambda: f"loading {args.model}"):
        tokenizer = models.load_tokenizer(files)
        task = runner.TASKS[args.task](args, plan.lengths, tokenizer)
        model = models.load_model(files, args.dtype, device)
        models.keep_converted(args.model, files, model, tokenizer)
    runner.run_rows(task, model, plan, args, out)
    print(
        f"wrote {out / args.task}.json{' and .png' if plots.available() else ''}", file=sys.stderr
    )
