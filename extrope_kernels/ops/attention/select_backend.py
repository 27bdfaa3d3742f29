"""Select the GPU backend of attention if none is named: a table, and the look-up in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import flash_attn
from .call import AttentionCall
from .flash_attn.engine_check import Kind, kind_of, unusable
from .flash_attn.engines import ENGINES, Engine, why_not

VARIABLE = "EXTROPE_ATTENTION"
_NAMES = ("triton", "flash_attn")
_DTYPES = (torch.float16, torch.bfloat16)
_ENGINES = {engine.name: engine for engine in ENGINES}


class Row(NamedTuple):
    """A row of the table: from `seqlen` on the composition over an engine runs, below it Triton."""

    major: int  # compute capability of the GPU
    head_dim: int  # at most; the engines take 8 more, for the gradient of lse
    seqlen: int | None  # None: Triton at any length
    engines: tuple[str, ...]  # best first
    why: str
    measured: bool = False


# The first row that fits a call counts. If none does, or none of its engines is here, Triton runs.
# Beyond its engine's forward the composition moves 51 bytes per element of q (counted). That is
# 58 % of FA3's time on an H100 at 8k x 128 dims; each doubling of the length halves the share. Its
# gain is the engine's speed (by the engines' authors and tritonbench), mostly in the backward: 561
# TFLOP/s of FA3 against an expected 100 to 170 of ours.
TABLE = (
    Row(8, 256, None, (), "flash-attn 2 is hardly faster, and the composition moves more bytes"),
    Row(9, 64, 32768, ("flash-attn 4", "flash-attn 3"), "497 TFLOP/s against 403 of Triton"),
    Row(9, 184, 16384, ("flash-attn 4", "flash-attn 3"), "648 TFLOP/s against 395 to 477"),
    Row(9, 256, 16384, ("flash-attn 4",), "flash-attn 3 has no repeatable backward beyond 192"),
    Row(10, 128, 8192, ("flash-attn 4",), "2.7 times Triton's speed"),
    Row(10, 256, None, (), "flash-attn 4 has no backward with a window beyond 128 there"),
    Row(12, 256, None, (), "flash-attn 4 has no repeatable backward there"),
)


class Shape(NamedTuple):
    """The properties of a call that decide the backend."""

    kind: Kind
    seqlen: int  # the shorter of queries and keys; for packed sequences the mean
    granularity: int = 1
    log_decay: bool = False
    pair_maps: bool = False
    refused: str | None = None  # why the composition refuses the call


class Selected(NamedTuple):
    """The selected backend and the reason."""

    backend: str
    reason: str
    engine: str | None = None  # for flash_attn; None: the best installed one


def select(
    major: int, shape: Shape, missing: Callable[[str], str | None], override: str = ""
) -> Selected:
    """Look a call up in the table.

    major: the GPU's compute capability.
    missing: returns why the engine of this name cannot run, or None; called only for the engines
        of a row that fits.
    override: the value of EXTROPE_ATTENTION.

    Raises: ValueError for another override than "triton" and "flash_attn".
    """
    if override:
        if override not in _NAMES:
            raise ValueError(
                f"attention: {VARIABLE} must be {' or '.join(_NAMES)}, got {override!r}"
            )
        return Selected(override, f"{VARIABLE}={override}")
    if why := _refused(shape):
        return Selected("triton", why)
    rows = (r for r in TABLE if r.major == major and shape.kind.head_dim <= r.head_dim)
    row = next(rows, None)
    if row is None:
        return Selected("triton", f"no row for compute capability {major}.x and such a head_dim")
    if row.seqlen is None:
        return Selected("triton", row.why)
    if shape.seqlen < row.seqlen:
        return Selected("triton", f"shorter than {row.seqlen} tokens")
    reasons = {engine: missing(engine) for engine in row.engines}
    for engine, why in reasons.items():
        if why is None:
            source = "measured" if row.measured else "estimated"
            return Selected(
                "flash_attn", f"{engine} from {row.seqlen} tokens on ({source})", engine
            )
    return Selected("triton", "; ".join(why for why in reasons.values() if why))


def _refused(shape: Shape) -> str | None:
    """Return why the composition cannot or should not take a call, or None."""
    if shape.kind.dtype not in _DTYPES:
        return f"flash-attention takes 16-bit dtypes, got {shape.kind.dtype}"
    if shape.granularity != 1:
        return f"the composition takes regions of granularity 1, got {shape.granularity}"
    if shape.log_decay:
        return "the composition is not tested with log_decay"
    if shape.pair_maps:
        return "the composition rotates maps of pairs in PyTorch, in float64"
    if shape.refused is not None:
        return f"the composition does not take {shape.refused}"
    return None


def select_backend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Selected:
    """Select the GPU backend of a call; forward and backward find the same."""
    seqlen, _, head_dim = q.shape[-3:]
    if call.cu_seqlens is None:
        seqlen = min(seqlen, k.shape[-3])
    else:
        seqlen //= max(1, call.cu_seqlens.shape[0] - 1)
    refused = None
    if v.shape[-1] != head_dim:
        refused = "a head_dim of v's own"
    elif call.q_start is not None or call.k_start is not None:
        refused = "q_start and k_start"
    given = (call.log_decay is not None, call.pair_maps is not None)
    shape = Shape(kind_of(q, v), seqlen, call.granularity, *given, refused)
    selected = _select(q.device, os.environ.get(VARIABLE, ""), shape)
    asked = selected.backend == "flash_attn" and selected.engine is None
    if asked and (reason := flash_attn.missing()):
        raise NotImplementedError(f"attention: {selected.reason} cannot run here: {reason}")
    return selected


def engine_named(name: str | None) -> Engine | None:
    """Return the engine of a selection."""
    return None if name is None else _ENGINES[name]


@functools.lru_cache(maxsize=4096)  # an engine is imported and tried once
def _select(device: torch.device, override: str, shape: Shape) -> Selected:
    def missing(engine: str) -> str | None:
        return unusable(_ENGINES[engine], device, shape.kind)

    return select(_major(device), shape, missing, override)


def _major(device: torch.device) -> int:
    # The same numbers mean other chips at AMD: gfx942 is 9.4.
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def selections() -> dict[str, str]:
    """Describe the selection, a line each, for the GPUs here; without any, for the table's."""
    if override := os.environ.get(VARIABLE, ""):
        try:
            reason = select(0, _shape(TABLE[0]), lambda _: None, override).reason
        except ValueError as error:
            reason = str(error)
        return {"attention on cuda": reason}
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    here = {_major(device): device for device in devices}
    lines = {
        f"attention on sm_{row.major}x, head_dim to {row.head_dim}": _line(row, here.get(row.major))
        for row in TABLE
        if not here or row.major in here
    }
    return {**lines, "attention on other GPUs" if lines else "attention on cuda": "triton"}


def _line(row: Row, device: torch.device | None) -> str:
    shape = _shape(row)

    def missing(engine: str) -> str | None:
        if device is None:
            return why_not(_ENGINES[engine], (row.major, 0), row.head_dim)
        return unusable(_ENGINES[engine], device, shape.kind)

    backend, reason, _ = select(row.major, shape, missing)
    return f"{backend}: {reason}" + ("" if backend == "triton" else ", triton below")


def _shape(row: Row) -> Shape:
    return Shape(Kind(torch.bfloat16, row.head_dim, 1, False), row.seqlen or 0)
