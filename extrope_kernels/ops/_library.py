"""The library of operations, and how kernels of the compiled libraries come into it."""

from __future__ import annotations

import torch

from .. import _ext

library = torch.library.Library("extrope", "FRAGMENT")


def load_on_first_use(name: str, key: str, fallback: dict) -> None:
    """Register kernels for `key` that load (or build) the compiled library, then call the op again.

    They make way for the library's own kernels, or for `fallback` where the library cannot be had.
    """
    stand_in = torch.library.Library("extrope", "IMPL")

    def settle(reason: str | None) -> None:
        if reason is not None:
            for op_name, function in fallback.items():
                library.impl(op_name, function, key)

    def first_call(op_name: str):
        def kernel(*args, **options):
            _ext.load(name)
            return getattr(torch.ops.extrope, op_name)(*args, **options)

        return kernel

    for op_name in fallback:
        stand_in.impl(op_name, first_call(op_name), key)
    _ext.watch(name, stand_in._destroy, settle)
