"""The authors' values, kept in tests/support/data."""

from __future__ import annotations

import json
from pathlib import Path


def load(name: str) -> dict:
    """What data/NAME_vectors.json holds."""
    return json.loads((Path(__file__).parent / "data" / f"{name}_vectors.json").read_text())
