"""Runs every operation on one GPU while another is current, and says what is wrong with that.

As a program, in a process that has touched no GPU yet: on GPU 1, with GPU 0 current.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from support import operations
from torch import Tensor

# Of the largest value: how accurate an operation is, other tests say.
TOLERANCE = 1e-3


def results(name: str, where: str, backend: str | None) -> list[Tensor]:
    operation, device = operations.OPERATIONS[name], operations.device
    operations.device = lambda: where
    try:
        outs = operation(backend, **operation.tensors(0, torch.float32))
    finally:
        operations.device = device
    return [x.detach().cpu().double() for x in outs]


def problems(
    name: str,
    where: str,
    backend: str | None,
    current_device: Callable[[], int],
    in_use: Callable[[int], bool],
) -> Iterator[str]:
    """What is wrong with an operation on device `where` while GPU 0 is current and not in use."""
    got = results(name, where, backend)
    for i, (x, want) in enumerate(zip(got, results(name, "cpu", "reference"), strict=True)):
        x, want = (t.masked_fill(t == -torch.inf, 0.0) for t in (x, want))
        error, largest = (x - want).abs().max().item(), want.abs().max().item()
        if not error <= TOLERANCE * largest:  # NaN too
            yield f"result {i} is off by {error} of {largest}"
    if current_device() != 0:
        yield f"GPU {current_device()} is current"
    if in_use(0):
        yield "a context was opened on GPU 0"


def main() -> int:
    found, has_context = [], torch._C._cuda_hasPrimaryContext
    # Later on both in turn: a kernel kept for one must not run on the other. bool(0) is False: that
    # GPU 0 is in use is right then.
    for where, in_use in (("cuda:1", has_context), ("cuda:0", bool), ("cuda:1", bool)):
        by_default = [(name, None) for name in operations.OPERATIONS]
        for name, backend in (*by_default, *operations.everywhere()):
            about = (where, backend, torch.cuda.current_device, in_use)
            found += [f"{name}, {backend} on {where}: {x}" for x in problems(name, *about)]
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
