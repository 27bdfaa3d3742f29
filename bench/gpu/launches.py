"""The kernels that each check of smoke.py must launch.

A name is not enough: rope and attention have a rotate_kernel each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Kernel(NamedTuple):
    backend: str
    op: str  # of ops/, or of csrc/cuda/
    name: str

    def __str__(self) -> str:
        return f"{self.op}'s {self.name} ({self.backend})"

    def is_seen_as(self, launch: str) -> bool:
        """Match a name of the profiler: plain for Triton's kernels, with types for C++."""
        if self.backend == "triton":
            return launch == self.name
        return launch != self.name and bool(re.search(rf"(?<![A-Za-z_]){self.name}", launch))


class Source(NamedTuple):
    """A check of checks.py that launches, over all dtypes."""

    operation: str
    backend: str


def source_of(name: str) -> Source:
    """Read a check's name: OPERATION, BACKEND, DTYPE."""
    operation, backend, _ = name.rsplit(", ", 2)
    return Source(operation, backend)


# The operation that must launch each kernel: tests/package/test_gpu_kernels.py.
OPERATIONS = {
    Kernel("triton", "rope", "rotate_kernel"): "rope",
    Kernel("triton", "rope", "cos_sin_kernel"): "rope by cos and sin",
    Kernel("triton", "rope", "norm_rotate_kernel"): "norm and rope",
    Kernel("triton", "rope", "norm_rotate_backward_kernel"): "norm and rope, backward",
    Kernel("triton", "rope", "rope_append_kernel"): "norm, rope and append",
    Kernel("triton", "attention", "rotate_kernel"): "rerope",
    Kernel("triton", "attention", "forward_kernel"): "rerope",
    Kernel("triton", "attention", "dq_kernel"): "rerope",
    Kernel("triton", "attention", "dkv_kernel"): "rerope",
    Kernel("triton", "attention", "merge_kernel"): "merge",
    Kernel("triton", "attention", "decode_kernel"): "rerope with a cache",
    Kernel("cuda", "rope", "rope_kernel"): "rope",
}


def never_launched(seen: Mapping[Source, set[str]], backends: Iterable[str]) -> list[Kernel] | None:
    """Return the kernels of these backends that no check launched; None if the profiler saw none.

    seen: the launches of each check, by the profiler's names.
    """
    if not any("kernel" in launch for launches in seen.values() for launch in launches):
        return None
    every = [(kernel, name) for kernel, name in OPERATIONS.items() if kernel.backend in backends]
    return [
        kernel
        for kernel, name in every
        if not any(map(kernel.is_seen_as, seen.get(Source(name, kernel.backend), ())))
    ]
