"""What a tile may spill that won on a card: see bench/gpu/tune.py."""

from __future__ import annotations

from importlib import import_module

from .case import Case, itemsize

# Bytes of a thread: the time that won counts them. No more, since it is of one variant of a kernel.
MOST_STACK = 48


def allowed_stack(case: Case) -> int:
    """None where no time tells what a spill costs."""
    return MOST_STACK if _leaf(case).get("measured") else 0


def _leaf(case: Case) -> dict:
    """Of the table of tiles; nothing for kernels that are not tuned."""
    from extrope_kernels.ops._shared.triton.tiles import tile

    op, name = case.kernel.split()[:2]
    if (op, name) == ("cache", "decode"):
        op, name = "decode", "chunk" if case.has("chunk") else "one_token"
        name += "_fp8" if case.has("fp8") else ""
    elif op != "attention" or name == "rotate":
        return {}
    table = import_module(f"extrope_kernels.ops.{op}.triton.configs").TABLE
    return tile(op, table, name, case.head_dim, itemsize(case.dtype), case.capability)
