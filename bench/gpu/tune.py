"""Time candidate tiles of the main kernels, and put the winner into the table of configurations.

A candidate is forced in the look-up of configs.py, and counts only if its results pass the tests'
error budget. One that does not compile or does not fit is listed with the reason.

The table: {"forward": {"90": {"128": {"block_m": 128, ...}}}}: kernel, chip (and later ones up to
the next row), largest head_dim. A leaf that was timed has "measured" and "card" beside its fields,
and is not used for other audited chips. candidates.json has a list of leaves in place of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from bench_attention import frequencies, make_inputs
from bench_decode import caches, decode_paged
from compare import with_backward
from harness import Call, paired, table
from machine_code import CHIPS
from shapes import HEADS_K, HEADS_Q, KEYS, KEYS_WINDOW, SEQLEN, WINDOW

from extrope_kernels import rope_attention, scores
from extrope_kernels.ops._torch.layouts import forget
from extrope_kernels.ops.attention.triton import configs

from . import smoke
from .results import Deadline, Verdict, about

KERNELS = {"forward": "forward", "dq": "dq", "dkv": "dkv", "decode": "one_token"}  # in the table
DTYPE = torch.bfloat16
SHORT = {"seqlen_q": 256, "heads_q": 16, "heads_k": 4}  # small enough for float64
SECONDS = 2.0  # of timing
GAIN = 0.99  # a winner must take less than this share of the shipped one's time
HEAD = ["head_dim", "configuration", "ms", "over the shipped one", ""]


@dataclass
class Timed:
    """A candidate and its milliseconds, or why it has none."""

    head_dim: int
    fields: dict
    milliseconds: float | None = None
    reason: str = ""


def run(name: str, deadline: Deadline) -> Verdict:
    """Tune; the common head_dim comes first, so that a lack of time costs the others."""
    kernel, made_with = KERNELS[name], about()
    chip, card = made_with["capability"], made_with["card"]
    every = candidates(kernel, chip)
    total, found, written = sum(map(len, every.values())), [], []
    for dim in sorted(every, key=lambda dim: (dim != 128, dim)):
        timed = []
        for one in each_timed(name, dim, every[dim], deadline):
            timed.append(one)
            found.append(one)
            deadline.keep(verdict(found, total, written))
        if len(timed) == len(every[dim]):
            best = winner(timed)
            replace(kernel, chip, dim, best.fields, card)
            written.append(f"{dim}: {words(best.fields)}")
    return verdict(found, total, written)


def each_timed(
    name: str, dim: int, fields_of_each: list[dict], deadline: Deadline
) -> Iterator[Timed]:
    """Time each candidate; the shipped one comes first and must run."""
    check, call = problem(name, dim)
    for number, fields in enumerate(fields_of_each):
        if not deadline:
            break
        one = Timed(dim, fields)
        try:
            with forced(KERNELS[name], dim, fields):
                check()
                one.milliseconds = paired(call, seconds=SECONDS)[0]
        except Exception as error:  # by a compiler, a launch, or the comparison
            one.reason = f"{type(error).__name__}: {str(error).strip()[:160]}"
            if number == 0:
                raise
        print(f"{dim} {words(fields)}: {one.reason or one.milliseconds}", flush=True)
        yield one


def problem(name: str, dim: int) -> tuple[Callable[[], None], Call]:
    """Return a short call that is checked, and a long one that is timed.

    A gradient's kernel is timed within forward and backward together: others are not forced.
    """
    if name == "decode":
        sizes = {"heads_q": HEADS_Q, "heads_k": HEADS_K}
        check = partial(smoke.check_decode, "rerope", "triton", DTYPE, 1, dim, **sizes)
        raw, _ = caches(KEYS, DTYPE, dim)
        return check, decode_paged(raw, scores.rerope(KEYS_WINDOW), "triton")
    check = partial(smoke.check_attention, "rerope", "triton", DTYPE, **SHORT, head_dim=dim)
    qkv = make_inputs(SEQLEN, HEADS_K, dim, DTYPE, HEADS_Q)
    given = frequencies(dim), scores.rerope(WINDOW)
    call = partial(rope_attention, *qkv, *given, backend="triton")
    return check, call if name == "forward" else with_backward(call, qkv)


@contextmanager
def forced(kernel: str, dim: int, fields: dict) -> Iterator[None]:
    """Force this configuration of the kernel in the look-up."""
    shipped = configs.config

    def config(asked: str, head_dim: int, itemsize: int, chip: int | str | None) -> configs.Config:
        if (asked, head_dim, itemsize) == (kernel, dim, DTYPE.itemsize):
            return configs.Config(**fields)
        return shipped(asked, head_dim, itemsize, chip)

    with mock.patch.object(configs, "config", config):
        forget()
        yield
    forget()


def winner(timed: list[Timed]) -> Timed:
    """Return the fastest; the shipped one, which is the first, unless another gains enough."""
    ran = [one for one in timed if one.milliseconds is not None]
    best = min(ran, key=lambda one: one.milliseconds)
    return best if best.milliseconds < GAIN * timed[0].milliseconds else timed[0]


def words(fields: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def verdict(found: list[Timed], total: int, written: list[str]) -> Verdict:
    ran = [one for one in found if one.milliseconds is not None]
    line = f"{len(ran)} of {total} configurations timed, {len(found) - len(ran)} refused"
    line += f"; written: {'; '.join(written) or 'nothing'}"
    # The tests compare the committed tables with the tiles.
    line += ". Now: python bench/gpu_audit.py, python bench/readme.py" if written else ""
    shipped: dict[int, float | None] = {}
    rows = []
    for one in found:
        base, time, over = shipped.setdefault(one.head_dim, one.milliseconds), "", ""
        if base and one.milliseconds:
            time, over = f"{one.milliseconds:.3f}", f"{one.milliseconds / base:.2f}"
        rows.append([str(one.head_dim), words(one.fields), time, over, one.reason])
    content = {"table": table(HEAD, rows), "written": written}
    return Verdict(bool(ran) and len(found) == total, line, content)


# -------------------------------------------------------------------------------------------------
# The table of configurations


def candidates(kernel: str, chip: int) -> dict[int, list[dict]]:
    """Return the configurations to time by head_dim, the shipped one first."""
    listed = json.loads(configs.TABLE.with_name("candidates.json").read_text())
    found = {}
    for dim, leaves in sorted(rows_for(listed[kernel], chip).items(), key=lambda row: int(row[0])):
        every = [fields_of(x) for x in (configs.leaf(kernel, int(dim), 2, chip), *leaves)]
        found[int(dim)] = [leaf for i, leaf in enumerate(every) if leaf not in every[:i]]
    return found


def replace(kernel: str, chip: int, head_dim: int, leaf: dict, card: str) -> None:
    """Write the winning leaf for this chip, and keep those of other audited chips.

    A chip without its own row gets one, and so does the next chip that shared its row.
    """
    shipped = json.loads(configs.TABLE.read_text())
    rows = shipped[kernel]
    own = rows_for(rows, chip)
    shared = {dim: fields_of(old) for dim, old in own.items()}
    after = next((other for other in CHIPS if other > chip), chip)
    if rows_for(rows, after) is own:
        rows.setdefault(str(after), dict(shared))
    row = rows.setdefault(str(chip), shared)
    row[str(head_dim)] = {**fields_of(leaf), "measured": True, "card": card}
    text = json.dumps(shipped, indent=1) + "\n"  # and then a leaf a line
    configs.TABLE.write_text(re.sub(r"\{[^{}]*\}", lambda x: json.dumps(json.loads(x[0])), text))
    configs.table.cache_clear()


def rows_for(by_chip: dict, chip: int) -> dict:
    """Return the rows of the chip, or of the last one before it."""
    chips = [name for name in by_chip if name.isdigit() and int(name) <= chip]
    return by_chip[max(chips, key=int)] if chips else {}


def fields_of(leaf: dict) -> dict:
    return {name: value for name, value in leaf.items() if name not in ("measured", "card")}
