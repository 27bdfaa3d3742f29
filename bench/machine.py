"""The machine that is measured, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import torch


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    if device() == "cuda":
        name = torch.cuda.get_device_name()
    else:
        amx = " and AMX" if torch.cpu._is_amx_tile_supported() else ""
        name = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}{amx}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


def memory() -> int:
    """Bytes of the device."""
    if device() == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def back_memory() -> None:
    """Touch memory before anything is timed.

    The host of a virtual machine backs a page when the guest first writes it: a fresh 80 MB output
    took 30 to 300 ms in a new machine, and 12 once its memory had been touched.
    """
    if device() == "cpu":
        torch.empty(3 << 30, dtype=torch.uint8).fill_(1)


def return_memory() -> None:
    """Give back to the system what malloc keeps of freed memory."""
    ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def kept_memory():
    """Let malloc keep what is freed, as jemalloc and other caching allocators do.

    By default glibc returns blocks past 32 MiB to the system, and every large output costs page
    faults again; a PyTorch set up for speed on CPUs does not pay them.
    """
    trim_threshold, mmap_max = -1, -4
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
    try:
        yield
    finally:
        mallopt(trim_threshold, 128 * 1024)
        mallopt(mmap_max, 65536)


@contextlib.contextmanager
def returned_memory():
    """Let malloc give every freed tensor back at once, so that a peak is of what is in use.

    By default it keeps those below 32 MiB, in pieces that larger ones do not fit into.
    """
    mmap_threshold = -3
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 128 * 1024)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 * 2**20)
