"""How kernels are launched: settled once for each layout of the tensors, then with little Python.

A plan has all of a launch but its tensors and what changes from call to call. Its first launch goes
the ordinary way, `kernel[grid](...)`, where Triton binds, specialises and compiles; later ones
start what came of it. So whatever Triton specialises on, beside dtypes and alignment of pointers,
must be settled in the plan, and of these `layouts_of` tells.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor

VECTOR_BYTES = 16
DIVISOR = 16  # Triton compiles a kernel for numbers that it divides, and one for others
INTERPRETED = triton.knobs.runtime.interpret
# Multiprocessors, where there is no device to ask: A100, H100, B200 and what is like them.
_PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
_MOST_PLANS = 4096
_plans: dict[Hashable, Any] = {}


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides of x, 0 along dimensions of size 1: torch leaves those open."""
    return tuple(0 if size == 1 else n for size, n in zip(x.shape, x.stride(), strict=True))


def alignment(itemsize: int, strides: Iterable[int], of_tokens: Iterable[int]) -> int:
    """Elements, 16 bytes at most, that divide these strides; kernels count in groups of so many.

    of_tokens: strides from one token to the next. Where there is a choice, DIVISOR divides these,
    in groups, and with them the strides of sequences, whatever their length.
    """
    most, of_tokens = math.gcd(VECTOR_BYTES // itemsize, *strides), tuple(of_tokens)
    steady = (n for n in (most, most // 2, most // 4, most // 8)
              if n and all(stride % (n * DIVISOR) == 0 for stride in of_tokens))  # fmt: skip
    return next(steady, most)


def layouts_of(*tensors: Tensor | None) -> Hashable:
    """All of these tensors that a plan may depend on."""
    return tuple(
        [
            None
            if x is None
            else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % VECTOR_BYTES == 0)
            for x in tensors
        ]
    )


def chip_of(x: Tensor) -> int | str | None:
    """The chip that kernels on x are compiled for: 10 * major + minor of NVIDIA's compute
    capability, the name of an AMD one, None for the interpreter.

    With EXTROPE_TRITON_CHIP in the environment tensors elsewhere are launched as on that chip; what
    such a launch does is up to the driver that Triton has been given.
    """
    if INTERPRETED:
        return None
    if x.is_cuda:
        return _chip(x.device.index)
    chip = os.environ.get("EXTROPE_TRITON_CHIP")
    if chip is None:
        raise NotImplementedError(
            "triton: kernels run on a GPU, or interpreted with TRITON_INTERPRET=1, "
            f"got a tensor on {x.device}"
        )
    return int(chip) if chip.isdigit() else chip


def processors_of(x: Tensor) -> int:
    """How many multiprocessors there are to keep busy."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    chip = chip_of(x)
    known = max((n for n in _PROCESSORS if isinstance(chip, int) and n <= chip), default=90)
    return _PROCESSORS[known]


@functools.cache
def _chip(device: int) -> int | str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def planned(make: Callable[..., Any], key: Hashable, *args: Any) -> Any:
    """make(*args), the plans of one call, made once for each key."""
    key = (make, key)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _plans[key] = make(*args)
    return found


def forget() -> None:
    """Drop all plans: after a change of what they were made from, such as tables of tiles."""
    _plans.clear()


class Plan:
    """One launch of `kernel` on a grid, settled but for its first parameters."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        like: Tensor,
        *,
        num_warps: int | None = None,
        num_stages: int | None = None,
        maxnreg: int | None = None,
        **settled: Any,
    ) -> None:
        """like: a tensor on the device; settled: the kernel's last parameters, by name in any
        order, constexprs too; the rest as Triton takes it, and chooses it where it is None.
        """
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.device = like.device.index if like.is_cuda else None
        self.settled = _in_order(kernel, settled)
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        self.options = {name: value for name, value in options.items() if value is not None}
        self._start: Callable[..., Any] | None = None

    def __call__(self, *given: Any) -> None:
        """Launch with the first parameters: tensors, and numbers that are not specialised."""
        if self.device is None or self.device == torch.cuda.current_device():
            self._launch(given)
        else:
            with torch.cuda.device(self.device):
                self._launch(given)

    def _launch(self, given: tuple[Any, ...]) -> None:
        # Whoever replaces Triton's way to launch, to count or to emulate, is to see every launch.
        ordinary = getattr(self.kernel.run, "__module__", None) == "triton.runtime.jit"
        if self._start is not None and ordinary:
            self._start(*given, *self.settled)
            return
        launch = self.kernel[self.grid]
        compiled = launch(*given, *self.settled, enable_fp_fusion=True, **self.options)
        if ordinary and compiled is not None:
            self._start = compiled[self.grid]


def _in_order(kernel: Any, settled: dict[str, Any]) -> tuple[Any, ...]:
    """What is settled, as the kernel's last parameters."""
    names = kernel.arg_names
    last = names[len(names) - len(settled) :]
    if settled.keys() != set(last):
        wrong = ", ".join(sorted(settled.keys() ^ set(last)))
        raise TypeError(f"{kernel.fn.__name__}: its last {len(last)} parameters differ by {wrong}")
    return tuple(settled[name] for name in last)
