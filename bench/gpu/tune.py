"""Time candidate tiles of the main kernels, and put the winner into the configuration table.

A candidate is forced by patching the op's look-up `config(kernel, head_dim, itemsize, capability)`
in every module that imported it. It counts only if its results pass the tests' error budget. One
that does not compile, does not fit, or spills more than allowed is listed with the reason.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from unittest import mock

from gpu_audit import MEASURED_STACK

from extrope_kernels.ops._shared.layouts import forget

from .config_table import ConfigTable
from .step import Deadline, Verdict

# The package of its table, and its name there.
KERNELS = {
    "forward": ("attention.triton", "forward"),
    "dq": ("attention.triton", "dq"),
    "dkv": ("attention.triton", "dkv"),
    "decode": ("attention.triton", "one_token"),
}
NAMES = {"one_token": "decode_kernel"}  # where the table's name is not the kernel's
WORD = 4  # Triton counts spills in words
HEAD = ["head_dim", "configuration", "ms", "over the shipped one", ""]
GAIN = 0.99  # a winner must take less than this share of the shipped one's time
# The tests compare the committed tables with the tiles.
AFTERWARDS = ("gpu_audit.py", "readme.py")


@dataclass
class Timed:
    """A candidate and its milliseconds."""

    head_dim: int
    fields: dict
    milliseconds: float | None = None
    reason: str = ""  # why it has no time, or does not count

    @property
    def counts(self) -> bool:
        return self.milliseconds is not None and not self.reason


def of(name: str) -> Callable[[Deadline], Verdict]:
    return functools.partial(run, name)


def run(name: str, deadline: Deadline) -> Verdict:
    """Tune; the common head_dim comes first, so that a lack of time costs the others."""
    import torch

    from .build import capability

    op, kernel = KERNELS[name]
    table, chip, card = ConfigTable.of(op), capability(), torch.cuda.get_device_name()
    if missing := table.missing():
        return Verdict(False, f"nothing to choose from: {missing}")
    every = table.candidates(kernel, chip)
    total = sum(map(len, every.values()))
    found: list[Timed] = []
    written: list[str] = []
    for dim in sorted(every, key=lambda dim: (dim != 128, dim)):
        timed = []
        for one in each_timed(op, kernel, dim, every[dim], deadline):
            timed.append(one)
            found.append(one)
            deadline.keep(verdict(found, total - len(found), written))
        if len(timed) == len(every[dim]) and (best := winner(timed)):
            table.replace(kernel, chip, dim, best.fields, card)
            written.append(f"{dim}: {words(best.fields)}")
    return verdict(found, total - len(found), written)


def each_timed(
    op: str, kernel: str, dim: int, candidates: list[dict], deadline: Deadline
) -> Iterator[Timed]:
    """Time each candidate; the shipped one comes first and must run."""
    from .tune_problems import problems

    small, large = problems(op, kernel, dim)
    for number, fields in enumerate(candidates):
        if not deadline:
            break
        one, before = Timed(dim, fields), stack_of_binaries(op, kernel)
        try:
            with forced(op, kernel, dim, fields):
                small()
                one.milliseconds = large()
            if number > 0:
                one.reason = too_much(stack_of_binaries(op, kernel), before)
        except Exception as error:  # by a compiler, a launch, or the comparison
            one.reason = f"{type(error).__name__}: {str(error).strip()[:160]}"
            if number == 0:
                raise
        print(f"{dim} {words(fields)}: {one.reason or one.milliseconds}", flush=True)
        yield one


def stack_of_binaries(op: str, kernel: str) -> dict[str, int]:
    """Return the bytes of stack per thread of all binaries of a table's kernel launched here.

    They are those that the driver reports after loading.
    """
    name, prefix = NAMES.get(kernel, f"{kernel}_kernel"), f"extrope_kernels.ops.{op}."
    modules = [module for path, module in list(sys.modules.items()) if path.startswith(prefix)]
    found = {id(x): x for module in modules if (x := getattr(module, name, None)) is not None}
    # An interpreted kernel has none.
    devices = [getattr(one, "device_caches", {}).values() for one in found.values()]
    binaries = [binary for each in devices for cache, *_ in each for binary in cache.values()]
    return {x.hash: WORD * x.n_spills for x in binaries if x.module is not None}


def too_much(stack: dict[str, int], before: dict[str, int]) -> str:
    """Return a reason if binaries compiled since spill more than a measured tile may; else ""."""
    most = max((size for binary, size in stack.items() if binary not in before), default=0)
    return f"{most} bytes of stack, allowed are {MEASURED_STACK}" if most > MEASURED_STACK else ""


@contextmanager
def forced(op: str, kernel: str, dim: int, fields: dict) -> Iterator[None]:
    """Force this configuration of the kernel in the look-up."""
    configs = import_module(f"extrope_kernels.ops.{op}.configs")
    original = configs.config

    def config(asked: str, head_dim: int, itemsize: int, capability: int | None):
        found = original(asked, head_dim, itemsize, capability)
        if (asked, head_dim, itemsize) == (kernel, dim, 2):
            return type(found)(**fields)
        return found

    with mock.patch.object(configs, "config", config):
        forget()
        yield
    forget()


def winner(timed: list[Timed]) -> Timed | None:
    """Return the fastest; the shipped one, which is the first, unless another gains enough."""
    shipped = timed[0]
    if not shipped.counts:
        return None
    best = min((one for one in timed if one.counts), key=lambda one: one.milliseconds)
    return best if best.milliseconds < GAIN * shipped.milliseconds else shipped


def words(fields: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def verdict(found: list[Timed], left: int, written: list[str]) -> Verdict:
    ran = [one for one in found if one.counts]
    line = f"{len(ran)} of {len(found) + left} configurations timed, "
    line += f"{len(found) - len(ran)} refused"
    line += f"; written: {'; '.join(written)}" if written else "; nothing written"
    if written:
        line += f". Now: {', '.join(f'python bench/{name}' for name in AFTERWARDS)}"
    shipped: dict[int, float | None] = {}
    rows = []
    for one in found:
        base = shipped.setdefault(one.head_dim, one.milliseconds)
        time = "" if one.milliseconds is None else f"{one.milliseconds:.3f}"
        over = f"{one.milliseconds / base:.2f}" if one.milliseconds and base else ""
        rows.append([str(one.head_dim), words(one.fields), time, over, one.reason])
    content = {"table": {"head": HEAD, "rows": rows}, "written": written}
    return Verdict(bool(ran) and not left, line, content)
