"""The `check` command: its options and its report."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .._usage import UsageError, quiet, stay_offline
from ..integrations._shared.saved import SAVED, SavedFolder
from .advice import Advice, advise
from .facts import Facts, Rotation, gather
from .gguf import lost_in_gguf
from .source import Source, read_source

_WIDTH, _LABEL = 100, 17
_QUOTED = re.compile(r"'[^']*'|\"(?:\\\\.|[^\"\\\\])*\"")
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 2 if the model cannot be read."""
    try:
        stay_offline()
        quiet()
        source = read_source(args.model)
        try:
            facts = gather(source)
        except UsageError as error:
            raise UsageError(f"{args.model}: {error}") from error
    except UsageError as error:
        print(f"check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    advice = None if args.length is None else advise(args.model, source, facts, args.length)
    if args.json:
        print(json.dumps(as_json(args.model, source, facts, advice), indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(report(args.model, source, facts, advice, colour)))
    return 0


def as_json(model: str, source: Source, facts: Facts, advice: Advice | None) -> dict[str, Any]:
    """Return the facts for a program."""
    length = facts.length.reach if advice is None else advice.length
    cache = asdict(facts.cache) | {
        "length": length,
        "bytes_at_length": facts.cache.bytes_at(length),
    }
    return asdict(facts) | {
        "model": model,
        "reach": facts.reach,
        "cache": cache,
        "saved": source.saved and asdict(source.saved),
        "advice": advice and asdict(advice),
    }


def report(
    model: str, source: Source, facts: Facts, advice: Advice | None, colour: bool
) -> list[str]:
    """Return the lines of one screen."""
    red, plain = (_RED, _PLAIN) if colour else ("", "")
    lines = []
    for label, text, alarming in _paragraphs(model, source, facts, advice):
        for number, line in enumerate(_wrapped(text)):
            text = f"{red}{line}{plain}" if alarming else line
            lines.append(f"{'' if number else label:<{_LABEL}}{text}")
    return lines


def _wrapped(text: str) -> list[str]:
    """Wrap a line; a shell's line so that it can be copied, with its comment at the end."""
    command, hash_, comment = text.partition("  # ")
    shell = any(f"{each} " in command for each in ("serve", "sglang.launch_server", "llama-server"))
    width = _WIDTH - _LABEL - 2 * shell
    whole = _QUOTED.sub(lambda each: each[0].replace(" ", "\0") if shell else each[0], command)
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in lines]
    lines[:-1] = [f"{line} \\" if shell else line for line in lines[:-1]]
    if hash_ and len(lines[-1]) + len(hash_ + comment) > width:
        return [*lines, *(f"# {line}" for line in textwrap.wrap(comment, width - 2))]
    return [*lines[:-1], lines[-1] + hash_ + comment]


def _paragraphs(
    model: str, source: Source, facts: Facts, advice: Advice | None
) -> Iterator[tuple[str, str, bool]]:
    """Yield (label, text, alarming): the answer to --length first, lines to copy last."""
    if advice is not None:
        yield "to try first", f"{advice.first or 'nothing'}: {advice.why}", False
    keys = f"{facts.key_heads} of keys"
    if facts.latent is not None:
        keys = f"keys and values from a latent of {facts.latent}"
    heads = f"{facts.heads} heads of {facts.head_dim}, {keys}"
    yield "model", f"{model}: {facts.architecture}, {heads}", False
    if (saved := source.saved) is not None:
        yield "saved as", f"extended by {saved}: {_who_reads(saved)}", not saved.in_config
    length = facts.length
    yield "training length", f"{length.trained:,} tokens ({length.origin})", False
    if length.reach != length.trained:
        yield "", f"made for {length.reach:,} ({length.reach_origin})", False
    for number, each in enumerate(facts.rotations):
        yield "" if number else "rotation", _rotation(each, length.trained), False
    if facts.temperature and abs(facts.temperature - 1) > 1e-3:
        yield "", f"softmax scale {facts.temperature:.4g} / sqrt({facts.head_dim})", False
    yield from _passed_over(facts)
    if source.saved is not None and facts.latent is None:
        yield "GGUF", *_converted(source, facts)
    yield "cache", _cache(facts, length.reach if advice is None else advice.length), False
    yield "score methods", _scores(facts), False
    if advice is not None:
        yield from _lines(advice)


def _who_reads(saved: SavedFolder) -> str:
    if saved.in_config:
        return f"config.json says so too, as below; {SAVED} says all"
    return f"in {SAVED} alone; extend_from_saved reads it, and config.json is without it, as below"


def _converted(source: Source, facts: Facts) -> tuple[str, bool]:
    """Return what llama.cpp's converter makes of a saved folder, and if that is alarming."""
    if source.saved is not None and not source.saved.in_config:
        return "llama.cpp's converter reads config.json, which is without the extension", True
    if (lost := lost_in_gguf(source.config, facts.full_kind)) is not None:
        return f"llama.cpp's converter loses {lost}", True
    return "llama.cpp's converter keeps this rotation", False


def _lines(advice: Advice) -> Iterator[tuple[str, str, bool]]:
    """Yield what to copy for each engine; engines with the same line share one."""
    if advice.rope_parameters:
        yield "YaRN", f"ROPE='{json.dumps(advice.rope_parameters)}'", False
    engines: dict[str, list[str]] = {}
    for engine, line in advice.lines.items():
        engines.setdefault(line, []).append(engine)
    for line, sharing in engines.items():
        if len(sharing) == 1:
            yield sharing[0], line, False
        else:
            yield "other engines", f"{', '.join(sharing)}: {line}", False


def _rotation(each: Rotation, trained: int) -> str:
    window = f", the last {each.window:,} tokens" if each.window else ""
    layers = f"{each.layers} x {each.kind}{window}"
    if each.method is None:
        return f"{layers}: no rotation"
    factor = "" if each.factor is None else f", factor {each.factor:g}"
    axes = ""
    if each.sections:
        axes = f"; mRoPE, of {' + '.join(map(str, each.sections))} pairs by axis of positions"
    return (
        f"{layers}: {each.method}, base {each.base:g}{factor}, attention factor "
        f"{each.attention_factor:.5g}; {each.unfinished} of {each.pairs} pairs never finish a turn "
        f"in {min(trained, each.window or trained):,} tokens{axes}"
    )


def _passed_over(facts: Facts) -> Iterator[tuple[str, str, bool]]:
    """Yield what transformers does not read, or warns of."""
    said = [f"transformers: {key} is named and IGNORED" for key in facts.ignored]
    said += [f"transformers: {warning}" for warning in facts.warnings]
    for number, text in enumerate(said):
        yield "" if number else "applied", text, True


def _cache(facts: Facts, length: int) -> str:
    cache = facts.cache
    text = f"{cache.bytes_per_token:,} bytes a token in {cache.dtype}"
    text += "".join(f", and {each:,} of the last {window:,}" for window, each in cache.windowed)
    return f"{text}; {_gibibytes(cache.bytes_at(length))} at {length:,}"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:,.{0 if count > 1 << 37 else 2}f} GiB"


def _scores(facts: Facts) -> str:
    if facts.scores.refused is not None:
        return f"refused: {facts.scores.refused}"
    if facts.scores.layers == "all":
        return "none: all layers that rotate have a window or chunks"
    return "`extend` tells"
