"""The launch of a kernel, and facts needed for it: the chip, and the strides of rows."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

VECTOR_BYTES = 16
INTERPRETED = triton.knobs.runtime.interpret
# Multiprocessors, if there is no device to ask: A100, H100, B200 and similar chips.
_PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Return strides of x, 0 along dimensions of size 1: torch does not define those."""
    return tuple(0 if size == 1 else n for size, n in zip(x.shape, x.stride(), strict=True))


def chip_of(x: Tensor) -> int | str | None:
    """Return the chip that kernels on x are compiled for.

    For NVIDIA it is 10 * major + minor of the compute capability, for AMD a name, None for the
    interpreter. With EXTROPE_TRITON_CHIP in the environment, tensors on other devices are launched
    as on that chip; Triton's driver decides the effect.
    """
    if INTERPRETED:
        return None
    if x.is_cuda:
        return _chip(x.device.index)
    chip = os.environ.get("EXTROPE_TRITON_CHIP")
    if chip is None:
        raise NotImplementedError(
            "triton: tensors must be on a GPU, unless TRITON_INTERPRET=1 interprets the kernels, "
            f"got one on {x.device}"
        )
    return int(chip) if chip.isdigit() else chip


def processors_of(x: Tensor) -> int:
    """Return the number of multiprocessors to keep busy."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    chip = chip_of(x)
    known = max((n for n in _PROCESSORS if isinstance(chip, int) and n <= chip), default=90)
    return _PROCESSORS[known]


def strides_by_name(
    name: str, x: Tensor | None, align: int, dims: tuple[str, ...] = ("batch", "seq", "head")
) -> dict[str, int]:
    """Return the numbers {name}_stride_{dim} of a launch: strides of x, divided by `align`.

    A packed tensor has no dim "batch": 0. So are all strides without a tensor.
    """
    strides = (0, 0, 0) if x is None else (0, *strides_of(x)[:-1])[-3:]
    return {f"{name}_stride_{dim}": n // align for dim, n in zip(dims, strides, strict=True)}


class Launch:
    """A launch without its tensors, for tensors of one layout on one device.

    Triton looks at every argument to find the kernel compiled for them. That takes most of a
    call's time on the host, and all that it finds follows from the layout, but for one thing: does
    16 divide the addresses? So the first launch goes Triton's way and keeps the kernel. Later ones
    run it, unless an address is not divisible. AMD's kernels depend on the size of storages too:
    they always go Triton's way, as the interpreter does, which compiles nothing.

    Triton would compile again where a number becomes 1, or divisible by 16: never here. It would
    also choose a number's type by its value: a number that differs from call to call has its type
    in the kernel's signature, since the kept kernel would cut a larger one.
    """

    # Launch on the tensors' GPU, unless the grid is empty. Takes the tensors (the first two are no
    # tuples, and at most one is None) and the numbers of per_call, by their names in the kernel.
    run: Callable[..., None]

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *,
        numbers: dict[str, float | tuple[int, ...]],
        constants: dict[str, Any],
        options: dict[str, Any],
        per_call: tuple[str, ...] = (),
    ) -> None:
        """Describe the launch, by the names of the kernel's parameters.

        numbers: of the layout. constants: constexprs. options: Triton's own. per_call: the names of
        numbers that each call gives. The kernel's other parameters are tensors, or tuples of
        tensors: they come first, then numbers of a call. Triton compiles again for numbers in a
        tuple that become 1, or divisible by 16, whatever it is told.
        """
        parameters = inspect.signature(kernel.fn).parameters
        fixed = {**numbers, **constants}
        given = tuple(name for name in parameters if name not in fixed)
        _check(kernel.__name__, parameters, given, numbers, constants, per_call)
        self.grid = grid
        self.run = _in_order(kernel.__name__, given, self._launch_on_gpu)
        self._kernel = _unspecialized(kernel.fn, frozenset((*numbers, *per_call)))
        self._tensors = len(given) - len(per_call)
        self._fixed = tuple(fixed[name] for name in parameters if name in fixed)
        self._options = options
        self._kept: Callable[..., None] | None = None

    def _launch_on_gpu(self, values: tuple[Any, ...]) -> None:
        if 0 in self.grid:
            return
        x = values[1] if values[0] is None else values[0]
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(x):
                self._launch(values)
        else:
            self._launch(values)

    def _launch(self, values: tuple[Any, ...]) -> None:
        for x in values[: self._tensors]:
            if x is not None and (_unaligned(x) if type(x) is tuple else x.data_ptr() % 16):
                self._by_triton(values)
                return
        if self._kept is not None:
            self._kept(*values, *self._fixed)
            return
        compiled = self._by_triton(values)
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            self._kept = compiled[(*self.grid, 1, 1)[:3]]

    def _by_triton(self, values: tuple[Any, ...]) -> Any:
        return self._kernel[self.grid](*values, *self._fixed, **self._options)


def _unaligned(tensors: tuple[Tensor, ...]) -> bool:
    return any(x.data_ptr() % 16 for x in tensors)


def _check(
    kernel: str,
    parameters: Mapping[str, inspect.Parameter],
    given: tuple[str, ...],
    numbers: Mapping[str, Any],
    constants: dict[str, Any],
    per_call: tuple[str, ...],
) -> None:
    """Raise unless names and types are those of the kernel; given: what a call gives."""
    typed = {name: x for name, x in parameters.items() if x.annotation is not x.empty}
    constexprs = {name for name, x in typed.items() if "constexpr" in str(x.annotation)}
    if wrong := constexprs ^ constants.keys():
        raise TypeError(f"{kernel}: missing, or no constants: {', '.join(sorted(wrong))}")
    if wrong := numbers.keys() - parameters.keys():
        raise TypeError(f"{kernel} has no numbers {', '.join(sorted(wrong))}")
    if wrong := [name for name in per_call if name not in typed]:
        raise TypeError(
            f"{kernel}: {', '.join(wrong)} may differ in every call, so its type must be annotated"
        )
    tensors = [name for name in given if name not in per_call]
    if wrong := [name for name in tensors if name in typed]:
        raise TypeError(f"{kernel}: {', '.join(wrong)} has a type, so it is a number: whose?")
    if [*tensors, *per_call] != [*parameters][: len(given)]:
        raise TypeError(
            f"{kernel}: tensors come first, then a call's numbers, then what the layout fixes; "
            f"got {', '.join(tensors)} as tensors"
        )


def _in_order(
    kernel: str, names: tuple[str, ...], launch: Callable[[tuple[Any, ...]], None]
) -> Callable[..., None]:
    """Return a function of keyword arguments that gives `launch` their values in this order.

    Made of text, it has the kernel's own parameters: Python finds a name that is missing or wrong,
    and a call takes a quarter of the time that a dict of the arguments would.
    """
    listed = ", ".join(names)
    run = eval(f"lambda *, {listed}: launch(({listed},))", {"launch": launch})
    run.__qualname__ = kernel
    return run


@functools.cache
def _unspecialized(function: Callable[..., None], numbers: frozenset[str]) -> Any:
    """Return the kernel, which no value of these numbers compiles again."""
    return triton.jit(function, do_not_specialize=sorted(numbers))


@functools.cache
def _chip(device: int) -> int | str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
