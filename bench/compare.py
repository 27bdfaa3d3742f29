"""Ours against a floor and against every peer that runs here: one row each."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import harness
import torch
from harness import NAN, Call, Calls, Report, Row, clock, device, name_of, paired
from torch import Tensor

SECONDS = 4.0  # at most for one pairing, so that a slow peer does not take minutes


@dataclass
class Floor:
    """A lower bound: `factor` times the time of `call`."""

    call: Call
    factor: float = 1.0


def matmul_floor(flops: float, dtype: torch.dtype) -> Floor:
    """Return the time of `flops` operations at the rate of the fastest square matrix product."""
    if device() == "cpu":
        # A product of 2048 would take most of the time of --quick, with its small calls.
        side = 256 if flops < 2**30 else 2048
    else:
        # Its tiles of 128 x 256 fill the chip 16 times: no last wave shows.
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        side = 1024 * math.ceil(math.sqrt(16 * processors * 128 * 256) / 1024)
    return Floor(_fastest_product(dtype, device(), side), flops / (2 * side**3))


@functools.cache
def _fastest_product(dtype: torch.dtype, device: str, side: int) -> Call:
    wide = [torch.randn(side, side, device=device) for _ in range(2)]
    a, b = (x.to(dtype) for x in wide)
    products = [lambda: torch.matmul(a, b)]
    if device == "cpu":
        # A processor without instructions for 16 bits multiplies floats faster. And MKL, which
        # matmul calls for them, reaches half of oneDNN's rate on AMD.
        onednn = torch.ops.mkldnn._linear_pointwise
        products.append(lambda: torch.matmul(*wide))
        products.append(lambda: onednn(*wide, None, "none", [], ""))
    times = paired(*products, repeats=3)
    return products[times.index(min(times))]


@harness.kept_memory()
def compare(
    report: Report,
    case: str,
    calls: Calls,
    *,
    dtype: torch.dtype,
    shape: str,
    floor: Floor,
    backend: str = "",
    yardsticks: Calls | None = None,
    error: Callable[[object], float] | None = None,
    few: dict[str, Call] | None = None,
    bars: dict[str, float] | None = None,
    own: Collection[str] = (),
) -> None:
    """Add a row for each of `calls`, by name, the first of which is ours, and of `yardsticks`.

    calls: a string instead of a call says why it cannot run here. A peer that raises is absent too;
        if ours raises, the run ends.
    yardsticks: calls that compute something else, and so have no error.
    error: the error of a call's result, or of that of its `checked` if it overwrites its input.
    few: the same calls on one token, for the time on the host.
    bars: by name, the largest allowed ratio of our time over theirs.
    own: the names of others that are ours too.
    """
    ours = next(iter(calls.values()))
    for name, call in {**calls, **(yardsticks or {})}.items():
        row = Row(case, name, name_of(dtype), shape, backend if call is ours else "")
        is_own = call is ours or name in own
        row.absent = call if isinstance(call, str) else "" if is_own else why_not(call)
        if not row.absent:
            # The floor separately: the call after a copy waits until its lines are written back.
            beside = functools.partial(paired, repeats=report.args.repeats, seconds=SECONDS)
            row.milliseconds, its_floor = beside(call, floor.call)
            row.of_floor = floor.factor * its_floor / row.milliseconds
            if call is not ours:
                row.milliseconds, our_time = beside(call, ours)
                row.ratio = our_time / row.milliseconds
            row.bar = (bars or {}).get(name, NAN)
            if error and name in calls:
                row.error = error(getattr(call, "checked", call)())
            row.megabytes = harness.peak_megabytes(call)
            if few and name in few:
                calls_and_rounds = (2, 2) if report.args.quick else (100, 20)
                row.host_microseconds = harness.host_microseconds(few[name], *calls_and_rounds)
        report.add(row)


def why_not(call: Call) -> str:
    """Return why a call cannot run here, in a line, or "". Lazy code compiles here."""
    try:
        clock(call)()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
    return ""


def with_backward(call: Call, leaves: Sequence[Tensor]) -> Call:
    """Return the call together with the gradients of the leaves that its results depend on."""
    for leaf in leaves:
        leaf.requires_grad_()
    grads: list[Tensor] = []

    def run():
        result = call()
        outs = [result] if isinstance(result, Tensor) else list(result)
        if not grads:
            grads.extend(torch.randn_like(x) for x in outs)
        return torch.autograd.grad(outs, leaves, grads)

    return run


def trained(calls: Calls, leaves: Sequence[Tensor] | None = None) -> Calls:
    """Return each call with the gradients of its own leaves, or of these; or leave it out."""
    found = {name: getattr(call, "leaves", leaves) for name, call in calls.items()}
    return {
        name: call if isinstance(call, str) else with_backward(call, found[name])
        for name, call in calls.items()
        if isinstance(call, str) or found[name]
    }


def error_of_tail(exact: list[Tensor]) -> Callable[[object], float]:
    """Return the largest error of the last tokens from float64 ones (batch, tokens, heads, dim).

    Takes one tensor or several, sequence first or heads first.
    """

    def error(result: object) -> float:
        outs = [result] if isinstance(result, Tensor) else list(result)
        differences = []
        for out, x in zip(outs, exact, strict=True):
            out = (out if out.shape[2] == x.shape[2] else out.transpose(1, 2)).detach()
            differences.append((out[:, -x.shape[1] :].double() - x).abs().max().item())
        return max(differences)

    return error


def by_name(available: Callable[[], list[str]]) -> dict[str, str | None]:
    """Return the `backend` of each implementation; None is the default."""
    if device() == "cpu":
        return {"cpu": None}
    return {name: name for name in available() if name != "reference"}


# -------------------------------------------------------------------------------------------------
# A cache for each layer, as in models: a step finds none of them in the processor's own

BYTES = 2**29  # of all layers together: more than the last level of caches keeps
MOST_LAYERS = 64


def layers_of(*cache: Tensor) -> list[Sequence[Tensor]]:
    """Copy a cache often enough; on a GPU a replay flushes the cache itself."""
    size = sum(x.nbytes for x in cache)
    count = min(BYTES // size, MOST_LAYERS) if device() == "cpu" else 1
    return [cache, *(tuple(x.clone() for x in cache) for _ in range(count - 1))]


def by_layer(step: Callable[..., object], layers: Sequence[Sequence[Tensor]]) -> Call:
    """Return a call of step(*cache) for one layer after another."""
    caches = itertools.cycle(layers)
    return lambda: step(*next(caches))
