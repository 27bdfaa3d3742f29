"""What the emulated ops are run on."""

from __future__ import annotations

from collections.abc import Iterator

from . import append_cases, norm_cases
from .norm_cases import Case


def everything() -> Iterator[Case]:
    yield from norm_cases.everything()
    yield from append_cases.everything()


def shared_memory() -> Iterator[Case]:
    """For the thread sanitizer: every barrier of the kernels."""
    yield from norm_cases.shared_memory()
    yield from append_cases.shared_memory()
