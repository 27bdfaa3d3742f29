"""The emulated ops in a namespace of their own, with the schemas of those that they stand for."""

from __future__ import annotations

import ctypes

import torch

from extrope_kernels.ops.rope import norm_schema
from extrope_kernels.ops.rope.append import schema as append_schema

NAMESPACE = "extrope_emulated"
_SCHEMAS = {
    "rope_norm_fwd": norm_schema._FWD,
    "rope_norm_bwd": norm_schema._BWD,
    "rope_norm_inplace": norm_schema._INPLACE,
    "rope_append": append_schema._SCHEMA,
}
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
ops = getattr(torch.ops, NAMESPACE)


def load(path: str) -> None:
    """Register the kernels of a library that is built for the host."""
    register = ctypes.CDLL(path).extrope_register
    register.restype = ctypes.c_char_p
    if why := register(NAMESPACE.encode(), 0):
        raise RuntimeError(why.decode())
