"""Backends that can run here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os

import torch

from ... import _ext
from .autograd import constant_when_compiled


@constant_when_compiled
def missing(backend: str, device: str | None = None) -> str | None:
    """Return why `backend` cannot run on `device` ("cpu", "cuda", None for any), or None."""
    if backend in ("cpu", "cuda"):
        return _ext.load(backend)
    if backend == "triton":
        return _missing_triton(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if backend == "fla":
        return _missing_fla(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return None


_found: set[tuple] = set()  # calls that `require` has let pass


def require(op: str, backend: str, known: tuple[str, ...], device: str, why=missing) -> None:
    """Raise if a named backend is unknown or cannot run on tensors of `device`."""
    asked = (op, backend if isinstance(backend, str) else None, device, why)
    if asked in _found:
        return
    if backend not in known:
        raise ValueError(f"{op}: backend must be None or one of {list(known)}, got {backend!r}")
    needs = {"cpu": "cpu", "cuda": "cuda"}.get(backend, device)
    if device != needs:
        raise NotImplementedError(
            f"{op}: backend {backend!r} runs on {needs} tensors, got one on {device}"
        )
    if reason := why(backend, device):
        raise NotImplementedError(f"{op}: backend {backend!r} cannot run here: {reason}")
    _found.add(asked)


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
