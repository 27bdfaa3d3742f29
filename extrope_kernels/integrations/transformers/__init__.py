"""Hugging Face models: `extend` a loaded model by any method, `restore` it exactly."""

from .._shared.parameters import PARAMETERS
from .extension import Extension, extend
from .interface import register_interface

__all__ = ["PARAMETERS", "Extension", "extend", "register_interface"]
