"""Hugging Face models: `extend` a loaded model by any method, `restore` it exactly."""

from .extension import Extension, extend
from .interface import register_interface
from .parameters import PARAMETERS

__all__ = ["PARAMETERS", "Extension", "extend", "register_interface"]
