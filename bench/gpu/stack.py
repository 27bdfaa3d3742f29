"""Stack that binaries of a Triton kernel spill, as the driver reports it after loading."""

from __future__ import annotations

import sys

NAMES = {"one_token": "decode_kernel"}  # where the table's name is not the kernel's
WORD = 4  # Triton counts in words


def stack_of_binaries(op: str, kernel: str) -> dict[str, int]:
    """Return the bytes per thread of a table's kernel, of all binaries launched here."""
    name, prefix = NAMES.get(kernel, f"{kernel}_kernel"), f"extrope_kernels.ops.{op}."
    modules = [module for path, module in list(sys.modules.items()) if path.startswith(prefix)]
    found = {id(x): x for module in modules if (x := getattr(module, name, None)) is not None}
    # An interpreted kernel has none.
    devices = [getattr(one, "device_caches", {}).values() for one in found.values()]
    binaries = [binary for each in devices for cache, *_ in each for binary in cache.values()]
    return {x.hash: WORD * x.n_spills for x in binaries if x.module is not None}
