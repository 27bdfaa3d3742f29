"""How glibc hands out the memory of tensors."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """Let the process reuse what its tensors free, instead of returning it to the system each time.

    A forward over a long text makes and frees tensors of 100 MB by the hundred, and fresh pages
    cost more time than most of the arithmetic on them. Does nothing where malloc is not glibc's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
