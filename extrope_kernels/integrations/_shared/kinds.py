"""The names that transformers' configurations give to kinds of layers."""

from __future__ import annotations

# Layers that see a bounded number of keys.
_BOUNDED = ("sliding", "chunked", "local")


def is_bounded(kind: str) -> bool:
    """Say whether layers of that name see a bounded number of keys.

    A "reference_sliding_attention" does not: it sees the prompt from anywhere.
    """
    return kind.startswith(_BOUNDED) or kind.endswith(_BOUNDED)
