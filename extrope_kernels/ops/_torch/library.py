"""The ops `torch.ops.extrope`, and the loading of compiled kernels into them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _ext

library = torch.library.Library("extrope", "FRAGMENT")
ops = torch.ops.extrope
_again = threading.local()


def load_on_first_use(fallbacks: dict[str, dict]) -> None:
    """Register kernels that load (or build) the compiled library, then call the op again.

    fallbacks: for each device ("cpu", "cuda") whose library has these ops, a function for every
        op; registered if that library cannot be loaded.

    A device's own kernels take precedence whenever they arrive: a call of another thread always
    finds a kernel while the library is being loaded.
    """

    def settle_for(device: str):
        def settle(reason: str | None) -> None:
            if reason is not None:
                for op_name, function in fallbacks[device].items():
                    if device == "cpu":
                        function = _with_strides_of_fake(op_name, function)
                    library.impl(op_name, function, device.upper())

        return settle

    def first_call(op_name: str):
        def kernel(*args, **options):
            first = next(_tensors(args))
            device = first.device.type
            if device not in fallbacks or getattr(_again, "calling", None) == op_name:
                raise NotImplementedError(
                    f"{op_name}: no kernel for {first.layout} tensors on {device}"
                )
            if _ext.is_deferred(device):
                return fallbacks[device][op_name](*args, **options)
            _ext.load(device)
            _again.calling = op_name
            try:
                return getattr(ops, op_name)(*args, **options)
            finally:
                _again.calling = None

        return kernel

    for device in fallbacks:
        _ext.watch(device, settle_for(device))
    for op_name in next(iter(fallbacks.values())):
        library.impl(op_name, first_call(op_name), "CompositeExplicitAutograd")


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
