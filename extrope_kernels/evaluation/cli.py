"""The command `eval`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .._usage import UsageError, stay_offline
from . import plots
from .runner import evaluate


def run(args: argparse.Namespace) -> int:
    """Run `eval`; return 0, 2 for a mistake, 130 for Ctrl-C, each told in one line."""
    given = dict(vars(args))
    del given["command"]
    stay_offline()
    if not plots.available():
        print(
            "eval: no plot will be drawn: matplotlib is not installed (pip install matplotlib)",
            file=sys.stderr,
        )
    try:
        _eval(**given)
    except UsageError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # such as a full disk
        why = " ".join(str(error).split())
        print(f"eval: {why}{_kept(args.out)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"eval: interrupted{_kept(args.out)}", file=sys.stderr)
        return 130
    return 0


def _kept(out: str) -> str:
    """Return where the finished rows are, if there are any."""
    return f"; finished rows are in {out}" if any(Path(out).glob("*.json")) else ""


def _eval(methods: list[str] | None, param: list[tuple[str, str, Any]], **given: Any) -> None:
    params: dict[str, dict[str, Any]] = {method: {} for method in methods or ()}
    for method, name, value in param:
        params[method][name] = value
    given["text"] = given["text"] or "pydocs"
    evaluate(methods=params or None, table=sys.stdout, **given)
    png = " and .png" if plots.available() else ""
    print(f"wrote {given['out']}/{given['task']}.json{png}", file=sys.stderr)
