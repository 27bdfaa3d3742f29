"""Hugging Face models: `extend` a loaded model with any frequency method, `restore` it exactly."""

from .extension import Extension, extend

__all__ = ["Extension", "extend"]
