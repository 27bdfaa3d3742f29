"""The ops `torch.ops.extrope`, the backends that run them, and the loading of compiled ones."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _ext
from .autograd import constant_when_compiled

library = torch.library.Library("extrope", "FRAGMENT")
ops = torch.ops.extrope

# -------------------------------------------------------------------------------------------------
# Backends


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


# -------------------------------------------------------------------------------------------------
# Ops

_WITH_OPS = tuple(name for name, backend in ALL_BACKENDS.items() if backend.has_ops)
_again = threading.local()


def declare(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Declare an op without kernels."""
    library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    kernels: Mapping[str, Callable[..., Any]],
    *,
    libraries: tuple[str, ...] = ("cpu",),
    on_gpu: Callable[..., Any] | None = None,
) -> tuple[str, ...]:
    """Define an op, and one with a suffix for each backend that has ops of its own.

    kernels: the op's functions by backend. On a device, the op runs by the library of C++ that has
        it, or else by the backend that stands in there.
    libraries: those that have it.
    on_gpu: what runs on a GPU, if not the backend that stands in there.

    Returns: the suffixes, "" first.
    """
    own = {f"_{x}": function for x, function in kernels.items() if ALL_BACKENDS[x].has_ops}
    for suffix in ("", *own):
        declare(name + suffix, schema, fake)
    for suffix, function in own.items():
        for device in ("CPU", "CUDA"):  # on a CPU: interpreted, or as tests stub it
            library.impl(name + suffix, function, device)
    stand_ins = {ALL_BACKENDS[x].stands_in: function for x, function in kernels.items()}
    _load_on_first_use(name, {device: stand_ins[device] for device in libraries})
    if "cuda" not in libraries:
        library.impl(name, on_gpu or stand_ins["cuda"], "CUDA")
    return ("", *own)


def op_of(name: str, backend: str | None) -> Any:
    """Return an op, or the one that runs a backend which has ops of its own."""
    return getattr(ops, f"{name}_{backend}" if backend in _WITH_OPS else name)


def imported_when_called(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module that its first call imports."""

    @functools.cache
    def load():
        return getattr(importlib.import_module(module), name)

    return lambda *args, **options: load()(*args, **options)


def _load_on_first_use(name: str, stand_ins: Mapping[str, Callable[..., Any]]) -> None:
    """Register a kernel that loads (or builds) the compiled library, then calls the op again.

    stand_ins: a function for each device ("cpu", "cuda") whose library has the op; registered if
        that library cannot be loaded.

    A device's own kernels take precedence whenever they arrive: a call of another thread always
    finds a kernel while the library is being loaded.
    """

    def kernel(*args, **options):
        first = next(_tensors(args))
        device = first.device.type
        if device not in stand_ins or getattr(_again, "calling", None) == name:
            raise NotImplementedError(f"{name}: no kernel for {first.layout} tensors on {device}")
        if _ext.is_deferred(device):  # this thread must not load it now
            return stand_ins[device](*args, **options)
        _ext.load(device)
        _again.calling = name
        try:
            return getattr(ops, name)(*args, **options)
        finally:
            _again.calling = None

    def settle(device: str, reason: str | None) -> None:
        if reason is not None:
            function = stand_ins[device]
            if device == "cpu":
                function = _with_strides_of_fake(name, function)
            library.impl(name, function, device.upper())

    for device in stand_ins:
        _ext.watch(device, functools.partial(settle, device))
    library.impl(name, kernel, "CompositeExplicitAutograd")


def _with_strides_of_fake(op_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a kernel of a reference: give its results the strides of the fake, as graphs expect."""

    def kernel(*args, **options):
        results = function(*args, **options)
        if results is None:
            return None
        fake = getattr(ops, op_name)(*_meta(args), **options)
        if isinstance(results, Tensor):
            return _with_strides(results, fake.stride())
        return tuple(_with_strides(x, like.stride()) for x, like in zip(results, fake))

    return kernel


def _tensors(args: Any) -> Iterator[Tensor]:
    """Yield the tensors among an op's arguments, also those in lists."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _meta(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_meta(one) for one in x]
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
