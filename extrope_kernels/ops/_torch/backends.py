"""Backends that can run here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from ... import _ext
from .autograd import constant_when_compiled


def _missing_fla(device: str) -> str | None:
    if device == "cpu":
        return "flash-linear-attention needs a GPU"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    return None


def _missing_triton(device: str) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install triton)"
    # With a chip named, Triton's driver for it decides about a launch.
    elsewhere = os.environ.get("TRITON_INTERPRET") == "1" or "EXTROPE_TRITON_CHIP" in os.environ
    if device == "cpu" and not elsewhere:
        return "Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels on a CPU"
    return None


class Backend(NamedTuple):
    """Who computes, whatever the operation."""

    device: str | None  # whose tensors alone it takes
    missing: Callable[[str], str | None]  # (device) -> why it cannot run
    has_ops: bool = False  # ops of its own, which run it on any device: rope_fwd_triton
    stands_in: str | None = None  # the device where it runs ops that no library of C++ has


ALL_BACKENDS = {
    "reference": Backend(None, lambda device: None, stands_in="cpu"),
    "cpu": Backend("cpu", lambda device: _ext.load("cpu")),
    "cuda": Backend("cuda", lambda device: _ext.load("cuda")),
    "triton": Backend(None, _missing_triton, has_ops=True, stands_in="cuda"),
    "flash_attn": Backend(None, lambda device: None, has_ops=True),  # attention knows
    "fla": Backend(None, _missing_fla),
}


@constant_when_compiled
def missing(backend: str, device: str | None = None) -> str | None:
    """Return why `backend` cannot run on `device` ("cpu", "cuda", None for any), or None."""
    return ALL_BACKENDS[backend].missing(device or ("cuda" if torch.cuda.is_available() else "cpu"))


_found: set[tuple] = set()  # calls that `require` has let pass


def require(op: str, backend: str, known: tuple[str, ...], device: str, why=missing) -> None:
    """Raise if a named backend is unknown or cannot run on tensors of `device`."""
    asked = (op, backend if isinstance(backend, str) else None, device, why)
    if asked in _found:
        return
    if backend not in known:
        raise ValueError(f"{op}: backend must be None or one of {list(known)}, got {backend!r}")
    needs = ALL_BACKENDS[backend].device
    if needs is not None and device != needs:
        raise NotImplementedError(
            f"{op}: backend {backend!r} runs on {needs} tensors, got one on {device}"
        )
    if reason := why(backend, device):
        raise NotImplementedError(f"{op}: backend {backend!r} cannot run here: {reason}")
    _found.add(asked)
