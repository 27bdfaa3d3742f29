"""The exact merge of attention over disjoint sets of keys."""

from . import schema  # noqa: F401  (defines the ops)
from .api import merge_attention

__all__ = ["merge_attention"]
